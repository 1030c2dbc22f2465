"""Mid-training: the transformers Trainer with a dispersion term, and what an arm can add to it.

    trainer                `fit`: one arm of a build
    checkpoints            what is resumed from
    dispersion_trainer     the dispersion term for any transformers Trainer
    packed_dataset         blocks of tokens, with or without walls between documents
    chunked_cross_entropy  the loss without the logits of a whole batch
    quantization_aware     training under the rounding of a bundle
    quantized_weights      the weights that a bundle rounds
    lora                   LoRA and QLoRA: attach, save, merge
    arm_callbacks          NEFTune, embedding dropout, active forgetting
    performance            compiled layers, memory, timed steps

Only `trainer` and `dispersion_trainer` import the Trainer, which costs seconds and 100 MB.
"""

import logging

# Two lines of bitsandbytes that help nobody here: at its import (by transformers' Trainer) on CPUs with bf16,
# and at every forward pass of an int8 layer.
_USELESS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


def _is_useful(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_USELESS[record.name])


for _name in _USELESS:
    logging.getLogger(_name).addFilter(_is_useful)
