"""Scores of a language model: what it says about text it has not seen, and how sure the number is.

The torch model and every bundle are scored by the same code on the same items (`loglikelihood.py`).

    names -> task_suite -> heldout_tasks (heldout_items), lm_eval_adapter (lm_eval_tasks, lm_eval_metrics)
          -> loglikelihood (score_cache) -> task_result -> statistics -> seeds_and_means

quantization_survival compares differences before and after quantization, divergence whole distributions,
device_sample a phone's answers with this machine's; power tells what a comparison can see.
"""
