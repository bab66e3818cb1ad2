"""One model for many at a time: texts that are read and written together, and documents that are kept.

jobs: what is asked of an engine, and what it tells
engine: `Engine`, continuous batching in one context of llama.cpp
stored: texts of documents, kept on disk
library: `Library`, documents that are read in the background and asked about
"""
