"""Weights in few bits: the block grid that ONNX Runtime computes in, methods over it, its use on a bundle.

`rewrite.py` is the door: from an fp32 bundle to a quantized one, each weight by its choice (`assignment.py`),
with an account of bytes and errors (`accounting.py`). `grid.py` rounds and packs a matrix; `methods.py`
chooses scales by the weight alone, `gptq.py` by what its errors cost. `calibrated.py` takes GPTQ through a
torch model (`calibrate.py`), and `made.py` finds the result in the graph. `uses.py` finds the matrices in a
graph, `operators.py` makes the nodes that read them packed, `store.py` moves tensors.

`mixed.py` searches for bits, group and method of each weight: `units.py` are the graph's weights as parts of
the torch model, `sensitivity.py` says what rounding them costs, `candidates.py` what they could be stored as,
`search.py` is the knapsack. `levels.py` decides where activations may be rounded, too.
"""
