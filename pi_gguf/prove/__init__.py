"""A file is held against its plan, its model and its own window.

options: what a user may choose
check: the file in llama.cpp beside the model in transformers
certify: measure them
requirements: what they must be, as --require states it
inspect: what a file or folder states, and what is wrong
repair: a new header before the same data
card: a model card of what was measured
"""
