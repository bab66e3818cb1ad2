"""Position scaling: the mathematics of a longer window, and its spellings.

rope: `RopeScaling`, the one plan object, for transformers, GGUF and llama.cpp
own: the scaling that a model brings with it, Llama 3's, YaRN's, LongRoPE's
methods: Position Interpolation and what the field compares it with
"""
