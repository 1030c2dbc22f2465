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
from functools import partial

# Two lines of bitsandbytes that help nobody here: at its import (by transformers' Trainer) on CPUs with bf16,
# and at every forward pass of an int8 layer.
_USELESS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


def _is_useful(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)


for _name, _start in _USELESS.items():
    logging.getLogger(_name).addFilter(partial(_is_useful, _start))
