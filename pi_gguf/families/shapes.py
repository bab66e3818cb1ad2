"""Names and shapes of the tensors that a checkpoint of a family has on disk, and the head that may be the embedding.

In: an opened config whose variant is handled. Out: shapes by the names that transformers saves, as torch has them (out,
in). A test holds them equal to those of the models that transformers builds; nothing here imports it.

H heads, G key-value heads, d head size, D width, I inner width, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pi_gguf.families.family import Config, head_dim, kv_heads

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


def linear(name: str, rows: int, columns: int, *, bias: bool = False) -> Tensors:
    """Yield a linear layer's tensors."""
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def norm(name: str, size: int, *, bias: bool = False) -> Tensors:
    """Yield a norm's tensors."""
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def norms(config: Config, *names: str, bias: bool = False) -> Tensors:
    """Yield norms over the whole width."""
    for name in names:
        yield from norm(name, config.hidden_size, bias=bias)


def attention(config: Config, *, bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> Tensors:
    """Yield Q, K and V (H d, D), (G d, D), and what goes out (D, H d)."""
    rows, groups, width = config.num_attention_heads * head_dim(config), _kv_rows(config), config.hidden_size
    for name, size in (("q", rows), ("k", groups), ("v", groups)):
        yield from linear(f"self_attn.{name}_proj", size, width, bias=bias)
    yield from linear(f"self_attn.{out}", width, rows, bias=out_bias)


def _kv_rows(config: Config) -> int:
    return kv_heads(config) * head_dim(config)


def head_norms(q: Shape, k: Shape) -> Tensors:
    """Yield norms of queries and keys."""
    yield "self_attn.q_norm.weight", q
    yield "self_attn.k_norm.weight", k


def gated(config: Config, *, at: str = "mlp", inner: int | None = None, bias: bool = False) -> Tensors:
    """Yield a gated feed-forward part: (I, D) twice, (D, I)."""
    inner, width = inner or config.intermediate_size, config.hidden_size
    yield from linear(f"{at}.gate_proj", inner, width, bias=bias)
    yield from linear(f"{at}.up_proj", inner, width, bias=bias)
    yield from linear(f"{at}.down_proj", width, inner, bias=bias)


def plain(config: Config, up: str, down: str, *, inner: int | None = None, bias: bool = False) -> Tensors:
    """Yield a feed-forward part without a gate: (I, D), (D, I)."""
    inner, width = inner or config.intermediate_size, config.hidden_size
    yield from linear(up, inner, width, bias=bias)
    yield from linear(down, width, inner, bias=bias)


def fused_gate(config: Config) -> Tensors:
    """Yield a feed-forward part whose gate stands before what it gates: (2 I, D), (D, I)."""
    yield from linear("mlp.gate_up_proj", 2 * config.intermediate_size, config.hidden_size)
    yield from linear("mlp.down_proj", config.hidden_size, config.intermediate_size)


def experts(config: Config, *, inner: int | None = None) -> Tensors:
    """Yield a gated feed-forward part of each expert, and what chooses them (E, D)."""
    yield from linear("mlp.gate", config.num_experts, config.hidden_size)
    for expert in range(config.num_experts):
        yield from gated(config, at=f"mlp.experts.{expert}", inner=inner or config.moe_intermediate_size)


NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _llama(config: Config) -> Tensors:
    yield from attention(config, bias=config.attention_bias, out_bias=config.attention_bias)
    yield from gated(config, bias=config.mlp_bias)
    yield from norms(config, *NORMS)


def _mistral(config: Config) -> Tensors:
    yield from attention(config)
    yield from gated(config)
    yield from norms(config, *NORMS)


def _mixtral(config: Config) -> Tensors:
    yield from attention(config)
    yield from norms(config, *NORMS)
    inner, width, at = config.intermediate_size, config.hidden_size, "block_sparse_moe"
    yield from linear(f"{at}.gate", config.num_local_experts, width)
    for expert in range(config.num_local_experts):
        yield f"{at}.experts.{expert}.w1.weight", (inner, width)
        yield f"{at}.experts.{expert}.w2.weight", (width, inner)
        yield f"{at}.experts.{expert}.w3.weight", (inner, width)


def _qwen2(config: Config) -> Tensors:
    yield from attention(config, bias=True)
    yield from gated(config)
    yield from norms(config, *NORMS)


def _qwen2_moe(config: Config) -> Tensors:
    yield from attention(config, bias=config.qkv_bias)
    yield from experts(config)
    yield from gated(config, at="mlp.shared_expert", inner=config.shared_expert_intermediate_size)
    yield from linear("mlp.shared_expert_gate", 1, config.hidden_size)
    yield from norms(config, *NORMS)


def _qwen3(config: Config) -> Tensors:
    yield from _mistral(config)
    yield from head_norms((head_dim(config),), (head_dim(config),))


def _qwen3_moe(config: Config) -> Tensors:
    yield from attention(config)
    yield from head_norms((head_dim(config),), (head_dim(config),))
    yield from experts(config)
    yield from norms(config, *NORMS)


def _gemma2(config: Config) -> Tensors:
    yield from attention(config)
    yield from gated(config)
    yield from norms(config, *FOUR_NORMS)


def _gemma3(config: Config) -> Tensors:
    yield from _gemma2(config)
    yield from head_norms((head_dim(config),), (head_dim(config),))


def _phi(config: Config) -> Tensors:
    yield from attention(config, bias=True, out_bias=True, out="dense")
    yield from plain(config, "mlp.fc1", "mlp.fc2", bias=True)
    yield from norms(config, "input_layernorm", bias=True)


def _phi3(config: Config) -> Tensors:
    rows = config.num_attention_heads * head_dim(config)
    yield from linear("self_attn.qkv_proj", rows + 2 * _kv_rows(config), config.hidden_size)
    yield from linear("self_attn.o_proj", config.hidden_size, rows)
    yield from fused_gate(config)
    yield from norms(config, *NORMS)


def _falcon(config: Config) -> Tensors:
    width, new = config.hidden_size, config.new_decoder_architecture
    groups = config.num_kv_heads if new else 1 if config.multi_query else config.num_attention_heads
    yield from linear("self_attention.query_key_value", width + 2 * groups * head_dim(config), width)
    yield from linear("self_attention.dense", width, width)
    yield from plain(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", inner=config.ffn_hidden_size)
    names = ("ln_attn", "ln_mlp") if config.num_ln_in_parallel_attn == 2 else ("input_layernorm",)
    yield from norms(config, *names, bias=True)


def _gpt_neox(config: Config) -> Tensors:
    yield from linear("attention.query_key_value", 3 * config.hidden_size, config.hidden_size, bias=True)
    yield from linear("attention.dense", config.hidden_size, config.hidden_size, bias=True)
    yield from plain(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True)
    yield from norms(config, *NORMS, bias=True)


def _stablelm(config: Config) -> Tensors:
    yield from attention(config, bias=config.use_qkv_bias)
    yield from gated(config)
    yield from norms(config, *(NORMS[:1] if config.use_parallel_residual else NORMS), bias=True)
    if config.qk_layernorm:
        for name, heads in (("q", config.num_attention_heads), ("k", kv_heads(config))):
            for head in range(heads):
                yield from norm(f"self_attn.{name}_layernorm.norms.{head}", head_dim(config))


def _olmo(config: Config) -> Tensors:
    yield from attention(config)
    yield from gated(config)


def _olmo2(config: Config) -> Tensors:
    yield from _olmo(config)
    yield from head_norms((config.num_attention_heads * head_dim(config),), (_kv_rows(config),))
    yield from norms(config, "post_attention_layernorm", "post_feedforward_layernorm")


def _olmoe(config: Config) -> Tensors:
    yield from attention(config)
    yield from head_norms((config.hidden_size,), (_kv_rows(config),))
    yield from experts(config, inner=config.intermediate_size)
    yield from norms(config, *NORMS)


def _cohere(config: Config) -> Tensors:
    yield from _olmo(config)
    yield from norms(config, "input_layernorm")
    if config.use_qk_norm:
        size = head_dim(config)
        yield from head_norms((config.num_attention_heads, size), (kv_heads(config), size))


def _starcoder2(config: Config) -> Tensors:
    yield from attention(config, bias=True, out_bias=True)
    yield from plain(config, "mlp.c_fc", "mlp.c_proj", bias=True)
    yield from norms(config, *NORMS, bias=True)


def _glm4(config: Config) -> Tensors:
    yield from attention(config, bias=config.attention_bias)
    yield from fused_gate(config)
    yield from norms(config, *NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")


def _nemotron(config: Config) -> Tensors:
    yield from attention(config, bias=config.attention_bias, out_bias=config.attention_bias)
    yield from plain(config, "mlp.up_proj", "mlp.down_proj", bias=config.mlp_bias)
    yield from norms(config, *NORMS, bias=True)


def _mpt(config: Config) -> Tensors:
    yield from linear("attn.Wqkv", 3 * config.hidden_size, config.hidden_size)
    yield from linear("attn.out_proj", config.hidden_size, config.hidden_size)
    yield from plain(config, "ffn.up_proj", "ffn.down_proj", inner=4 * config.hidden_size)
    yield from norms(config, "norm_1", "norm_2")


def _bloom(config: Config) -> Tensors:
    width = config.hidden_size
    yield from linear("self_attention.query_key_value", 3 * width, width, bias=True)
    yield from linear("self_attention.dense", width, width, bias=True)
    yield from plain(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", inner=4 * width, bias=True)
    yield from norms(config, *NORMS, bias=True)


@dataclass(frozen=True)
class Layout:
    """What the tensors of a family are called, and which there are.

    Args:
        layer: the tensors of one layer.
        base: before the names of all but the head.
        embedding: its name.
        layers: of all layers.
        norms: those beside the layers.
        norm_bias: whether these have a bias.
        head: its name.
        head_bias: whether it has a bias.
    """

    layer: Callable[[Config], Tensors]
    base: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norms: Sequence[str] = ("norm",)
    norm_bias: bool = False
    head: str = "lm_head"
    head_bias: bool = False

    @property
    def tied(self) -> dict[str, str]:
        """The name of the head's matrix, and of the embedding that it may be."""
        return {f"{self.head}.weight": f"{self.base}.{self.embedding}.weight"}

    def shapes(self, config: Config) -> dict[str, Shape]:
        """Return shapes by name, the head among them even where it is the embedding."""
        embedding, layer = (config.vocab_size, config.hidden_size), list(self.layer(config))
        found: dict[str, Shape] = {f"{self.base}.{self.embedding}.weight": embedding}
        for i in range(config.num_hidden_layers):
            found.update((f"{self.base}.{self.layers}.{i}.{name}", shape) for name, shape in layer)
        for name in self.norms:
            found.update(norm(f"{self.base}.{name}", config.hidden_size, bias=self.norm_bias))
        return {**found, **dict(linear(self.head, *embedding, bias=self.head_bias))}


LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout(_llama), "mistral": Layout(_mistral), "mixtral": Layout(_mixtral),
    "qwen2": Layout(_qwen2), "qwen2_moe": Layout(_qwen2_moe), "qwen3": Layout(_qwen3), "qwen3_moe": Layout(_qwen3_moe),
    "gemma": Layout(_mistral), "gemma2": Layout(_gemma2), "gemma3_text": Layout(_gemma3),
    "phi": Layout(_phi, norms=("final_layernorm",), norm_bias=True, head_bias=True), "phi3": Layout(_phi3),
    "falcon": Layout(_falcon, "transformer", "word_embeddings", "h", ("ln_f",), norm_bias=True),
    "gpt_neox": Layout(
        _gpt_neox, "gpt_neox", "embed_in", norms=("final_layer_norm",), norm_bias=True, head="embed_out"
    ),
    "stablelm": Layout(_stablelm, norm_bias=True),
    "olmo": Layout(_olmo, norms=()), "olmo2": Layout(_olmo2), "olmoe": Layout(_olmoe),
    "granite": Layout(_llama), "cohere": Layout(_cohere), "starcoder2": Layout(_starcoder2, norm_bias=True),
    "smollm3": Layout(_mistral), "glm4": Layout(_glm4), "nemotron": Layout(_nemotron, norm_bias=True),
    "mpt": Layout(_mpt, "transformer", "wte", "blocks", ("norm_f",)),
    "bloom": Layout(
        _bloom, "transformer", "word_embeddings", "h", ("word_embeddings_layernorm", "ln_f"), norm_bias=True
    ),
}  # fmt: skip
"""Layouts by model_type."""


_NOT_ADAPTED = re.compile(r"\.experts\.|(mlp|moe)\.gate\.|norm\.weight$")
"""Matrices that no adapter is made for: experts, what chooses them, norms of every head."""


@dataclass(frozen=True)
class Adapted:
    """What adapters of LoRA train of a model, by the sizes of its tensors.

    Args:
        linear: shapes of the matrices that get an adapter.
        whole: how many parameters of embedding and norms are trained as they are.
    """

    linear: Sequence[Shape]
    whole: int

    def trained(self, rank: int) -> int:
        """Return how many parameters are trained with adapters of a rank."""
        return sum(rank * sum(shape) for shape in self.linear) + self.whole

    @property
    def linear_parameters(self) -> int:
        """How many parameters the adapted matrices have themselves."""
        return sum(math.prod(shape) for shape in self.linear)


def adapted(model_type: str, shapes: Mapping[str, Shape]) -> Adapted:
    """Return what adapters train of a model of these tensors."""
    [(head, embedding)] = LAYOUTS[model_type].tied.items()
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name not in (head, embedding)}
    vectors = [name for name in shapes if len(shapes[f"{name.rpartition('.')[0]}.weight"]) == 1]
    whole = sum(math.prod(shapes[name]) for name in [embedding, *vectors])
    return Adapted([shape for name, shape in matrices.items() if not _NOT_ADAPTED.search(name)], whole)
