"""LoRA adapters of other people, merged into a checkpoint's tensors while these are read.

adapted: `AdaptedCheckpoint` and `with_adapters`
files: an adapter's folder, config and tensors, as peft and others save them
merging: what an adapter does to one tensor
"""
