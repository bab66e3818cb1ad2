"""An open model and texts to numbers, whoever runs the model.

language_model: `LanguageModel`, what is asked of any model
perplexity: over windows of documents
passkey: keys found by distance, and k_max
kl: divergence of two models that read in step
haystack: prompts that fill a window
results: one typed report each
plots: reports as pictures
journal: finished items on disk, so that a command goes on
"""
