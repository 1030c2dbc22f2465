"""A trained model becomes a bundle: `model.onnx` with KV cache and fused attention, its runtime's files, and its checks.

`export.py` is the door. `families.py` reads a model folder into one neutral description, `decoder.py` writes the
graph from it, `builder.py` covers families that only onnxruntime-genai's builder knows, `layout.py` adds what the
runtimes need beside the graph, `session.py` runs a bundle, `check.py` proves that it works.
"""
