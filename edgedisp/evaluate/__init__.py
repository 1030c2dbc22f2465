"""Scores of a language model on text it has not seen, with intervals and paired comparisons.

names -> task_suite -> heldout_tasks, lm_eval_adapter -> loglikelihood (torch models and bundles alike)
results -> comparison (tasks, seeds, means, quantization) -> statistics (intervals, tests)
"""
