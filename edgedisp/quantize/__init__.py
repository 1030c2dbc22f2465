"""Weights in few bits: the block grid that ONNX Runtime computes in, and its use on a finished bundle.

`rewrite.py` is the door. `grid.py` rounds and packs a matrix, `uses.py` finds the matrices in a graph,
`operators.py` makes the nodes that read them packed, `store.py` moves tensors between files.
"""
