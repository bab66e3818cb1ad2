"""A checkpoint to a GGUF file in one pass, of any type that llama.cpp has.

options: what a user may choose
layout: every key and tensor before a byte is written
adapter: the same for an adapter's own file
writer: the pass, and going on after an interruption
kquants: K-quants and IQ4 by numba, ggml's bytes at several times its speed
imatrix: importance matrices
quantize: one GGUF file to another
"""
