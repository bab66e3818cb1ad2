"""A GGUF file run by llama.cpp, as applications use it.

sampling: how the next token is chosen
text: tokens to text as it comes
sequence: what a sequence holds in the cache
batch: tokens of several sequences, read at once
session: one sequence of tokens: read, written, kept from call to call
turns: one thread at a time
offload: types of the cache and layers on a GPU that fit
states: what was read, kept on disk
looked: where in a document a model looked while it wrote an answer
reading: `Reading`, a document that was read, asked any number of times
model: `Model`, what `pi_gguf.open` returns
chat: `Conversation`, turn by turn, about a document too
asynchronous: the same for programs made of coroutines
"""
