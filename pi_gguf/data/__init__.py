"""Training data: texts and conversations to token ids, and these to rows of one window each.

tokens: texts as token ids on disk
packing: documents to rows of one window, and their positions
rows: rows without end, of one source or of several by their shares
"""
