"""Stages: what they are (stage.py), which a recipe has (build_plan.py), and the function of each.

options.py       what each function sees of a recipe
prepare.py       base, corpus, items: the shared start
training.py      an arm's training; adapters.py: the audit and merge of adapters; rounding.py: the rounding
                 that quantization-aware training and its bundle share
bundles.py       export, quantize, what is left of training; search.py: bits by weight
measure.py       everything about one model, and latency; parity.py, condensation.py, scoring.py: its parts
package.py       bundles for devices
device_scores.py, size_estimate.py: scores on devices; sizes before anything runs
follow.py        the other processes of a launch; run_results.py: a build as a typed `Run`
"""
