"""llama.cpp's own libraries; nothing else imports llama_cpp.

library: the only door: the library, its log, calls in a thread of their own
opening: a file opened with `Llama`, adapters applied, a second context
quantizer: quantization types, rows and whole files quantized
cache: what a KV cache holds, and its size
watch: what a model multiplies its weights with, and where its heads look
grammars: grammars and schemas that may end the process or never end, tried in a child first
trial: what may end the process, tried in a child first
"""
