"""Dispersion: the loss, its collection in a forward pass, and the geometry it is meant to change.

`loss.py` holds one function per variant, `collect.py` gathers token vectors layer by layer while a model
runs, `geometry.py` measures condensation. The room imports torch alone, so that it can be used in any
training loop:

    penalty = Dispersion(variant="angular", weight=0.1)
    with penalty.watch(model):
        outputs = model(input_ids, attention_mask=mask, labels=labels)
        loss = outputs.loss + penalty.weight * penalty.loss(mask)
"""
