"""Mid-training: the transformers Trainer with a dispersion term, and what an arm can add to it.

    trainer                `fit`: one arm of a build; packed blocks, checkpoints, processes
    dispersion_trainer     the dispersion term for any transformers Trainer
    chunked_cross_entropy  the loss without the logits of a whole batch
    callbacks              NEFTune, embedding dropout, active forgetting, quantization-aware training
    quantized_weights      the weights that a bundle rounds
    lora                   LoRA and QLoRA: attach, save, merge
    performance            compiled layers, memory, timed steps

`trainer`, `dispersion_trainer` and `callbacks` import the Trainer, which costs seconds and 100 MB.
"""

import logging

# bitsandbytes warns at its import (by transformers' Trainer) on CPUs with bf16, and at every pass of an int8
# layer.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
