"""A GGUF file run by llama.cpp, as applications use it.

session: one sequence of tokens: read, written, kept from call to call
model: `Model`, what `pi_gguf.open` returns
"""
