"""From a GGUF file back to a Hugging Face folder.

opened: a file, or the parts of a split one, and what it states
rotation: keys and tensors of the position scaling -> `RopeScaling`
configuration: the fields of config.json
weights: tensors as floats, one at a time, into shards
tokenizer: the files of a tokenizer, proved equal to llama.cpp's
unpack: all of it under one name, `pi_gguf.unpack`
models: a GGUF file where a MODEL stands
"""
