"""The suites: each a command and a public function, for several targets at once.

options: what the suites share
suite: the loop over targets
perplexity: sliding windows, the paper's table 1
passkey: retrieval by distance, the paper's figure 2
needle: one sentence in long prose
ruler: needles, variables and counts of words
harness: an open model as lm-evaluation-harness takes one
short: benchmarks inside the original window, by lm-evaluation-harness
summarize: summaries of long documents, by ROUGE
kl: divergence from a reference, by position
matrix: quantizations by KV caches by depth
compare: ways to a longer window without training
bounds: the paper's theory on a model's weights
report: all of it on one page, beside the paper's figures
"""
