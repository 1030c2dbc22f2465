"""Mid-training: the transformers Trainer with a dispersion term, and low-rank adapters."""
