"""The families of models that are converted, by the model_type of their config. One small file each.

family: `Family`, what a family is to a conversion
declared: what each family's config declares, as data
shapes: names and shapes of its tensors
alibi: MPT and BLOOM, whose positions are biases
cohere: Command-R and Aya
falcon: Falcon 7B, 40B and 180B
gemma: Gemma 1, 2 and 3
glm4: GLM-4
gpt_neox: GPT-NeoX and Pythia
granite: Granite 3
llama: Llama, Mistral, Mixtral
nemotron: Nemotron 3 and Minitron
olmo: OLMo 1 and 2, OLMoE
phi: Phi 1.5, 2, 3 and later
qwen: Qwen2 and Qwen3, dense and with experts
smollm3: SmolLM3
stablelm: StableLM
starcoder2: StarCoder 2
"""

from __future__ import annotations

from pi_gguf.families import (
    alibi,
    cohere,
    falcon,
    gemma,
    glm4,
    gpt_neox,
    granite,
    llama,
    nemotron,
    olmo,
    phi,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from pi_gguf.families.family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.LLAMA, llama.MISTRAL, llama.MIXTRAL,
        qwen.QWEN2, qwen.QWEN2_MOE, qwen.QWEN3, qwen.QWEN3_MOE,
        gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3,
        phi.PHI, phi.PHI3, falcon.FALCON, gpt_neox.GPT_NEOX, stablelm.STABLELM,
        olmo.OLMO, olmo.OLMO2, olmo.OLMOE, granite.GRANITE, cohere.COHERE, starcoder2.STARCODER2, smollm3.SMOLLM3,
        glm4.GLM4, nemotron.NEMOTRON, alibi.MPT, alibi.BLOOM,
    )
}  # fmt: skip
