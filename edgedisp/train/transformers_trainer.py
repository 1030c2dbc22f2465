"""transformers' Trainer and its parts, from one place.

Importing them imports bitsandbytes if it is installed, which then has something to say (noise.py).

They cost 290 MB of memory and some seconds, so rooms that do not train stay clear of what imports this.
"""

from edgedisp.train.noise import quiet_bitsandbytes

with quiet_bitsandbytes():
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler
    from transformers.trainer_utils import get_last_checkpoint

__all__ = [
    "PrinterCallback",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "get_last_checkpoint",
    "get_scheduler",
]
