"""Several stages in one command.

options: the options of all concerns together
rescale: a GGUF file at another window: a new header before the same data
ollama: a GGUF file as a model of Ollama: its Modelfile
elsewhere: a plan for a machine that is not here
plan: what a run will do and cost
convert: extend, write, quantize, check, under one name at the end
demo: the main job on the bundled model, proved
"""
