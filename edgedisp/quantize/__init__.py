"""Weights in few bits: the block grid that ONNX Runtime computes in, methods over it, its use on a bundle.

`rewrite.py` is the door: from an fp32 bundle to a quantized one, each weight by its choice (`assignment.py`),
with a record of bytes and errors (`components.py`); `account.py` tells its size before it is made. `grid.py`
rounds and packs a matrix; `methods.py` chooses scales by the weight alone, `gptq.py` by what its errors cost;
`calibrated.py` takes gptq through a torch model (`calibrate.py`), `start.py` leaves one that can be trained
on, and `made.py` finds the result in the graph. `uses.py` finds the matrices in a graph, `operators.py` makes
the nodes that read them packed, `store.py` moves tensors. `survival.py` measures what is left of a training's
change (`origin.py`).

`mixed.py` searches for bits, group and method of each weight: `units.py` are the graph's weights as parts of
the torch model, `sensitivity.py` says what rounding them costs, `candidates.py` what they could be stored as,
`search.py` is the knapsack.
"""
