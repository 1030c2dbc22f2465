"""`edgedisp pilot`: which dispersion settings do anything at all, found out before hours are spent.

A weight that is too small for a budget changes nothing: at 80,000 tokens on SmolLM2-135M, weight 0.1 moved
the mean cosine by 0.001 and the held-out perplexity by 0.02 (of 11.9). So a pilot trains a handful of
settings for a few thousand tokens each and measures both beside a baseline.

    candidates.py  what is tried: every weight with every choice of layers and every variant, and the rungs
    halving.py     the rule: who goes on to the next rung, and the words for what a setting does
    run.py         the stages of a pilot and the loop over its rungs
    judging.py     differences to the baseline, with paired intervals
    show.py        table, verdict, and the line to paste into the recipe

Successive halving (Jamieson and Talwalkar, AISTATS 2016): the first rung trains every candidate for a share
of the tokens, the better half is trained for twice as many, and so on to the full number. Every rung is a
complete short run of its own, from the base weights, with its own warm-up and its own way down of the
learning rate, and the baseline is trained beside the candidates for the same tokens. So whatever is compared
are twins, and the last rung is what `edgedisp build` trains with that many tokens, bit for bit. The price:
nothing carries over from rung to rung, and a pilot with two halvings costs up to twice its last rung.

What a pilot leaves behind are figures. The trained weights are thrown away once they are measured: a dozen
models of a pilot would fill a disk, and a build makes the one that is wanted.

What it cannot say: whether a gain holds for another seed (one is trained; the intervals are over texts), or
what happens at a hundred times the tokens.
"""

from edgedisp.pilot.candidates import Candidate, Pilot, plan
from edgedisp.pilot.run import estimate, pilot_folder, run

__all__ = ["Candidate", "Pilot", "estimate", "pilot_folder", "plan", "run"]
