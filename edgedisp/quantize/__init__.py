"""Weights to few bits: the block grid that ONNX Runtime computes in (`grid.py`) and its use on a bundle (`rewrite.py`)."""
