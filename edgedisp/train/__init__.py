"""Mid-training: `trainer.fit` trains an arm with the transformers Trainer of `dispersion_trainer`.

`trainer`, `dispersion_trainer` and `callbacks` import the Trainer, which costs seconds and 100 MB.
"""

import logging

# bitsandbytes warns at its import (by transformers' Trainer) on CPUs with bf16, and at every pass of an int8
# layer.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
