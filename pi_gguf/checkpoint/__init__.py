"""A Hugging Face checkpoint: from MODEL, as the user gives it, to a checked config and a list of tensors.

checkpoint: `Checkpoint` and `load_checkpoint`
hub: MODEL to a folder: a folder itself, an id of the Hub, the bundled model
config: config.json, as transformers reads it, and what is unusual about it
plain: a usual config opened without transformers
tensors: where the weights lie, in whichever of their forms
weights: the bytes of a safetensors file, read piece by piece
agreement: what was read, held against the model that transformers builds
record: pi_gguf.json, the record of a fine-tune
"""
