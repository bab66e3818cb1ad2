"""SmolLM3: a Llama in which every fourth layer has no position encoding."""

from __future__ import annotations

from collections.abc import Sequence

from pi_gguf.families.family import INTERLEAVED_ROTARY, Config, Family, rms_fields, rms_keys


def _every_fourth_unrotated(config: Config) -> Sequence[list[int]]:
    return ([int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)],)


SMOLLM3 = Family(
    "smollm3", "smollm3", "SmolLM3", rms_keys, INTERLEAVED_ROTARY,
    {
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
        "no_rope_layers": _every_fourth_unrotated,
        "use_sliding_window": (False,),
    },
    fields=rms_fields,
)  # fmt: skip
