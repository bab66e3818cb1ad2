"""GGUF files as bytes and metadata; no model is opened here.

header: the header byte for byte, read and changed
file: metadata and tensor lists, written headers, names of tensors
places: which tensors of a checkpoint lie in which of a file
keys: what a file of a model must state about its architecture and window
findings: one finding, with what mends it
parts: the parts of a split file, as one
loadable: what llama.cpp would not survive
certificate: a file's own measurements, in its header
defects: what is wrong, and what it should be
"""
