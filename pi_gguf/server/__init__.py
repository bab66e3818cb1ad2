"""A GGUF file for many at a time: OpenAI's API, and a page for long documents. Needs the extra `serve`.

engine: `Engine`, continuous batching: many texts read and written in one context of llama.cpp
"""
