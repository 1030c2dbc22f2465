"""Scores of a language model: what it says about text it has not seen, and how sure the number is.

Everything here works over one small interface, token ids -> logits (`score.LanguageModel`), so that the torch
model and every ONNX bundle are scored by the same code on the same items.

score.py       log-likelihoods of continuations; rolling windows; joining two texts as tokens
forest.py      token sequences as trees, so that what they share is computed once
heldout.py     three tasks made from the recipe's own held-out documents
questions.py   how their items are made; sentences.py: where sentences end
harness.py     any lm-evaluation-harness task over the same callable
catalog.py     which of those there are, and reading their data
tasks.py       task names -> results: checks the names, prepares the items, scores a model
result.py      what a task leaves behind: metrics with intervals, and every item
statistics.py  intervals and tests for one model, and paired for two
subset.py      a random part of the items, scored on a device and compared; noting.py: of lm-eval's tasks
survival.py    differences of differences: is what training changed still there after quantization
divergence.py  how far one model's next-token distributions are from another's, streamed
"""
