"""A trained model becomes a bundle: `model.onnx` with KV cache and fused attention, and what runtimes need.

`export.py` is the door. `families.py` reads a model into the neutral `description.py` (`llama.py` and
`gpt.py` know the families, `parts.py` what they share), `decoder.py` writes the graph from that (`writer.py`
holds the file format), `builder.py` covers families that only
onnxruntime-genai's builder knows, `layout.py` adds the files beside the graph, `session.py` runs a bundle
with onnxruntime and `genai.py` with onnxruntime-genai, and `check.py` proves that it works (`shapes.py`: the
graph is sound; `kernels.py`: what runs it).
"""
