"""Weights in few bits: the block grid that ONNX Runtime computes in, methods over it, its use on a bundle.

`rewrite.py` is the door: from an fp32 bundle to a quantized one. `grid.py` rounds and packs a matrix;
`methods.py` chooses scales by the weight alone, `gptq.py` by what its errors cost; `nf4.py` has other levels.
`awq.py` rescales a torch model so that it rounds better. `calibrated.py` takes a method through a torch model
(`calibrate.py`), and `made.py` finds the result in the graph. `uses.py` finds the matrices in a graph,
`operators.py` makes the nodes that read them packed, `store.py` moves tensors.
"""
