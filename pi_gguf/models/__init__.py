"""Whatever is measured, opened as a `LanguageModel`.

options: how a model is opened
targets: a word of the command line to an open model
hf: a Hugging Face checkpoint
server: a model behind an OpenAI-compatible server
"""
