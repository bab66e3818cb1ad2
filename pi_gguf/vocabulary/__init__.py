"""Tokenizers and chat templates: from a Hugging Face folder to the keys of a GGUF file.

keys: the `tokenizer.*` keys of a file
byte_level: how a byte-level tokenizer splits a text, and llama.cpp's name for it
sentencepiece: tokenizer.model and its kin
templates: chat templates, parsed and run within bounds
chats: conversations of a data set to token ids, and which of them count
probes: texts that both libraries must tokenize alike
token_check: those texts, tokenized by both
"""
