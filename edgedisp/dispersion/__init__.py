"""Dispersion: the loss, its collection in a forward pass, and the geometry it is meant to change.

`loss.py` holds one function per variant, `blockwise.py` the two of them that training uses most without a
tokens x tokens matrix, `collect.py` computes a term layer by layer while a model runs, `config.py` is its one
argument, `geometry.py` measures condensation. The room imports torch alone, so that it can be used in any
training loop:

    term = DispersionConfig(variant="angular", weight=0.1).collector()
    with term.watch(model):
        outputs = model(input_ids, attention_mask=mask, labels=labels)
        loss = outputs.loss + term.weight * term.loss()
"""
