"""Weights in few bits on ONNX Runtime's block grid.

grid.py              the grid: round, dequantize, pack; rtn and k_quant, methods on the weight alone
gptq.py              GPTQ for one weight; calibration.py: over a model
onnx_rewrite.py      from an fp32 bundle to a quantized one; onnx_weights.py: its weights and who reads them
mixed_precision.py   bits, group and method of each weight under a budget of bytes or of perplexity
delta_survival.py    what rounding leaves of what training changed
"""
