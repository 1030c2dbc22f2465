"""Weights in few bits on ONNX Runtime's block grid.

grid.py              the grid: round, dequantize, pack
rounding_methods.py  rtn and k_quant: scales chosen by the weight alone
gptq.py              GPTQ: scales and integers chosen by what errors cost; calibration.py: over a model
weight_map.py        which torch parameters a weight of the graph is made of
onnx_rewrite.py      from an fp32 bundle to a quantized one; onnx_weights.py: weights found, read and written
mixed_precision.py   bits, group and method of each weight under a budget; sensitivity.py: what rounding a
                     weight costs in KL; knapsack.py: the choice under the budget
delta_survival.py    what rounding leaves of what training changed
"""
