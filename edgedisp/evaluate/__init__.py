"""Scores of a language model on text it has not seen, with intervals and paired comparisons.

The torch model and every bundle are scored by the same code on the same items (`loglikelihood.py`).

    names -> task_suite -> heldout_tasks (heldout_items), lm_eval_adapter (lm_eval_tasks)
          -> loglikelihood (score_cache) -> task_result -> statistics -> seeds_and_means

quantization_survival compares differences before and after quantization, divergence whole distributions,
device_sample a device's answers with this machine's.
"""
