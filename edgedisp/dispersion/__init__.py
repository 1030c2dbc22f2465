"""The dispersion loss, its collection in a forward pass, and the condensation it is meant to change.

    losses            one function per variant, with formulas and sources; `DispersionConfig`
    pairwise_kernel   the angular and cosine variants without a tokens x tokens matrix
    hooks             `DispersionLoss`: the loss of every layer, over sampled tokens, while a model runs
    condensation      the condensation profile of a model

The package imports torch alone, so that it can be used in any training loop:

    term = DispersionLoss(DispersionConfig(variant="angular", weight=0.1))
    with term.watch(model):
        outputs = model(input_ids, attention_mask=mask, labels=labels)
        loss = outputs.loss + term.weight * term.loss()
"""
