"""GLM-4: rotation of half a head in interleaved order, norms before and after; gate and up stay fused in GGUF."""

from __future__ import annotations

from pi_gguf.families.family import Family, rms_fields, rms_keys

GLM4 = Family(
    "glm4", "glm4", "GLM-4-0414", rms_keys, handles={"hidden_act": ("silu",)},
    fields=lambda stated: {**rms_fields(stated), "attention_bias": stated.has("attn_q.bias")},
)  # fmt: skip
