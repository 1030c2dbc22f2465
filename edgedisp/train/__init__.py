"""Mid-training: the transformers Trainer with a dispersion term, and low-rank adapters.

trainer.py     `fit`: one arm of a build, from settings.py, over the blocks of data.py
mixin.py       the dispersion term for any transformers Trainer
fused_head.py  cross-entropy without the logits
checkpoints.py what is resumed from, and what never is
transformers_trainer.py  the one place where the library's Trainer is imported
watch.py       condensation looked at on the way; reporting.py: who else gets the log
techniques.py  other ways to train, as callbacks
probe.py       a few timed steps for the plan
adapter.py     LoRA over a model: which linear maps, and what is refused
quantized.py   the nf4 or int8 base of QLoRA, and its dequantized weights
merge.py       a PEFT folder that knows its base; merging it into plain weights
audit.py       held-out loss, and weights rounded as a bundle's are: what a merge is judged by
"""
