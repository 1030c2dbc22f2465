"""Scores of a language model on text it has not seen, with intervals and paired comparisons.

The torch model and every bundle are scored by the same code on the same items (`loglikelihood.py`).

    names -> task_suite -> heldout_tasks, lm_eval_adapter (lm_eval_tasks) -> tokenization -> loglikelihood
    results -> comparison (tasks, seeds, means, quantization) -> statistics (intervals, tests)

divergence compares whole distributions, device_sample a device's answers with this machine's.
"""
