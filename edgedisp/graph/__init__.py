"""A trained model becomes a bundle: `model.onnx` with KV cache and fused attention, and all that runtimes
need.

`export.py` is the door. `families.py` reads a model folder into one neutral description, `decoder.py`
writes the graph from it (`writer.py` holds the file format), `builder.py` covers families that only
onnxruntime-genai's builder knows, `layout.py` adds the files beside the graph, `session.py` runs a bundle,
`check.py` proves that it works. `generate.py` runs it with onnxruntime-genai.
"""
