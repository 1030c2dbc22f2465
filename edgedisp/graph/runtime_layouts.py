"""A bundle for one kind of device: one folder that three runtimes open, with its weights stored once.
Layout gguf adds a file of its own for llama.cpp (quantize/gguf_file.py), or stands alone.

    bundle/
      genai_config.json                        onnxruntime-genai
      model.onnx                               onnxruntime-genai, optimum
      config.json, generation_config.json      optimum, transformers.js
      tokenizer.json, tokenizer_config.json    all
      app.json                                 apps
      onnx/model_q4.onnx                       transformers.js
      onnx/model_q4.onnx_data                  the weights of both graphs

onnxruntime refuses a weights file in `../`. So with transformers.js the weights lie in `onnx/` under the name
that it looks for, and `model.onnx` names them there. Left out: fp16 graphs for WebGPU, weights in parts.

Tables of positions are cut to the device's context: with 8,192 positions those of SmolLM2-135M are 2 MB of a
104 MB bundle, and the cache that a runtime allocates at once is 380 MB.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgedisp.core.errors import BadInput
from edgedisp.core.files import APP, GGUF_FILE, read_json, write_json
from edgedisp.graph import device_graph
from edgedisp.graph.app_contract import write_app
from edgedisp.graph.genai_config import GENAI_CONFIG, LENGTHS, context_length, set_threads
from edgedisp.graph.onnx_graph import DATA, GRAPH, WEIGHT_MAP, move_weights, read_graph, to_bytes

GENAI, WEB, OPTIMUM, GGUF = "onnxruntime-genai", "transformers.js", "optimum", "gguf"
LAYOUTS = (GENAI, WEB, OPTIMUM, GGUF)
NOT_COPIED = ("record.json", "manifest.json", "README.md", WEIGHT_MAP, GRAPH, DATA)
WEB_BYTES = 4_000_000_000  # of memory: WebAssembly reaches 4 GiB

# Precision -> `dtype` of transformers.js, and the end of its file's name.
DTYPES = {"fp32": ("fp32", ""), "int8": ("q8", "_quantized"), "int4": ("q4", "_q4")}

LOAD = {
    GENAI: """\
import onnxruntime_genai as og

model = og.Model(folder)
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # "false" for the text of a chat template
ids = tokenizer.encode(text)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 48, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))""",
    OPTIMUM: """\
from optimum.onnxruntime import ORTModelForCausalLM  # package optimum-onnx, with transformers 4
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text, return_tensors="pt")  # one text at a time: rows padded on the left come out wrong
output = model.generate(**ids, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
    WEB: """\
import { env, pipeline } from "@huggingface/transformers"; // 4.x

env.allowRemoteModels = false; // for a bundle on your own server or disk
env.allowLocalModels = true;
env.localModelPath = parent; // folder or address that holds the bundle's folder, with a / at the end
const generate = await pipeline("text-generation", name, { dtype: "$DTYPE" });
const [answer] = await generate(text, { max_new_tokens: 48, do_sample: false });
console.log(answer.generated_text);""",
    GGUF: """\
from llama_cpp import Llama  # package llama-cpp-python; or: llama-cli -m model.gguf

model = Llama(f"{folder}/model.gguf", n_ctx=0)
print(model(text, max_tokens=48, temperature=0)["choices"][0]["text"])""",
}
"""How each runtime opens a bundle. `folder`, `parent`, `name` and `text` are the reader's to fill in."""


def for_device(
    bundle: Path,
    output_dir: Path,
    *,
    threads: int,
    context: int | None = None,
    last_logits: bool = True,
    link: bool = False,
) -> dict[str, Any]:
    """Write `bundle` (graph and weights at its top) for a device into the empty folder `output_dir`.

    Logits within the context do not change. `context` None: the bundle's. link: a hard link in the place of a
    copy of the weights, where the file system can: for a folder that nobody writes to. Returns {threads,
    context}, the smaller of `context` and the bundle's. BadInput for less than one thread or position, or
    where there is no bundle.
    """
    if context is not None and context < 1:
        raise BadInput(f"context is {context}; at least 1 position is needed")
    model, available = read_graph(bundle / GRAPH), context_length(bundle)
    positions = min(available, context or available)
    for path in sorted(bundle.iterdir()):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, output_dir / path.name)
    if positions < available:
        device_graph.cut_positions(model.graph, output_dir, available - positions)
    elif not (link and _link(bundle / DATA, output_dir / DATA)):
        shutil.copyfile(bundle / DATA, output_dir / DATA)
    if last_logits:
        device_graph.keep_last(model.graph)
    (output_dir / GRAPH).write_bytes(to_bytes(model))
    genai, config = read_json(output_dir / GENAI_CONFIG), read_json(output_dir / "config.json")
    genai["model"]["context_length"] = genai.setdefault("search", {})["max_length"] = positions
    config |= {name: min(positions, config[name]) for name in LENGTHS if isinstance(config.get(name), int)}
    write_json(output_dir / GENAI_CONFIG, genai)
    if config:  # onnxruntime-genai's builder writes none
        write_json(output_dir / "config.json", config)
    set_threads(output_dir, threads)
    if positions < available or not (output_dir / APP).is_file():
        write_app(output_dir, read_json(output_dir / APP), positions)
    return {"threads": threads, "context": positions}


def _link(source: Path, target: Path) -> bool:
    """Whether `target` is now a second name of the file."""
    try:
        target.hardlink_to(source)
    except OSError:
        return False
    return True


def arrange(
    bundle: Path, layouts: Sequence[str], precision: str, browser: bool = False
) -> dict[str, dict[str, Any]]:
    """Turn a bundle (graph and weights at its top) into one of the `layouts`, in place; where none of them
    reads an ONNX graph, there is none.

    `browser`: the graph of transformers.js runs in WebAssembly, so its products are unfolded where they fit.

    Returns layout -> {graph, weights, load}: paths in the bundle, and how its runtime opens it. Of an
    unfolded graph there is {unfolded_bytes}, too: the memory that opening it takes.
    """
    dtype, suffix = DTYPES[precision]
    web = f"onnx/model{suffix}.onnx"
    weights = f"{web}_data" if WEB in layouts else DATA
    _write_tokenizer_settings(bundle)
    entries: dict[str, dict[str, Any]] = {
        name: {"graph": GRAPH, "weights": weights, "load": LOAD[name].replace("$DTYPE", dtype)}
        for name in LAYOUTS
        if name in layouts
    }
    if GGUF in layouts:
        entries[GGUF] |= {"graph": GGUF_FILE, "weights": GGUF_FILE}
    if WEB in layouts:
        entries[WEB] |= {"graph": web, **_write_web(bundle, bundle / web, dtype, browser)}
    if GENAI not in layouts:
        (bundle / GENAI_CONFIG).unlink()
    if GENAI not in layouts and OPTIMUM not in layouts:
        (bundle / GRAPH).unlink()
        (bundle / DATA).unlink(missing_ok=True)
    return entries


def _write_web(bundle: Path, path: Path, dtype: str, browser: bool) -> dict[str, int]:
    """Write the graph of transformers.js, and move the weights to where it and the first graph find them.

    Returns {unfolded_bytes}: the memory that opening takes, if its products are unfolded.
    """
    data = path.with_name(f"{path.name}_data")
    path.parent.mkdir()
    (bundle / DATA).rename(data)
    model = read_graph(bundle / GRAPH)
    move_weights(model, f"{path.parent.name}/{data.name}")
    (bundle / GRAPH).write_bytes(to_bytes(model))
    move_weights(model, data.name)
    device_graph.replace_quantized_gathers(model.graph)
    needed = device_graph.expected_bytes(model.graph, data.stat().st_size)
    is_unfolded = browser and device_graph.has_packed_products(model.graph) and needed <= WEB_BYTES
    if is_unfolded:
        device_graph.unfold(model.graph)
    path.write_bytes(to_bytes(model))
    config = read_json(bundle / "config.json")
    config["transformers.js_config"] = {"dtype": dtype, "use_external_data_format": {path.name: 1}}
    write_json(bundle / "config.json", config)
    return {"unfolded_bytes": needed} if is_unfolded else {}


def _write_tokenizer_settings(bundle: Path) -> None:
    """Settings that every runtime reads alike: optimum's transformers 4 does not know the tokenizer class of
    transformers 5; transformers.js begins a text with a token (Gemma) only with `add_bos_token`."""
    path = bundle / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    plain, marked = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    if marked[:1] != plain[:1]:
        settings["add_bos_token"] = True
    write_json(path, settings)
