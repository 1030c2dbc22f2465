"""A trained model becomes a bundle: `model.onnx` with KV cache and fused attention, and what runtimes need.

export.py            model folder -> fp32 bundle, and weight_map.json; the door of this package
architectures.py     torch model -> decoder_spec.py, the neutral description of a decoder
decoder_graph.py     description -> ONNX graph; builder_fallback.py: onnxruntime-genai's builder instead
genai_config.py      the configuration and tokenizer files beside the graph
session.py           runs a bundle with onnxruntime; also with every layer's output
verify.py            a bundle works, in onnxruntime and in onnxruntime-genai
device_graph.py      threads, context, last-token logits for a device; browser_graph.py: WebAssembly
runtime_layouts.py   one folder for onnxruntime-genai, transformers.js and optimum
onnx_graph.py        what rewriting a graph with onnx-ir needs
"""
