"""A trained model becomes a bundle: `model.onnx` with KV cache and fused attention, and what runtimes need.

export.py            model folder -> fp32 bundle and weight_map.json, also through onnxruntime-genai's builder
architectures.py     torch model -> `Decoder`; decoder_graph.py: `Decoder` -> ONNX graph
genai_config.py      the configuration and tokenizer files beside the graph
session.py           runs a bundle with onnxruntime, also with every layer's output
verify.py            a bundle works, in onnxruntime and in onnxruntime-genai
device_graph.py      graphs for devices and browsers; runtime_layouts.py: the folder for their runtimes
onnx_graph.py        what writing and rewriting graphs share
"""
