"""One folder that three runtimes open, with its weights stored once.

    bundle/
      genai_config.json                        onnxruntime-genai
      model.onnx                               onnxruntime-genai, optimum
      config.json, generation_config.json      optimum, transformers.js
      tokenizer.json, tokenizer_config.json    all
      onnx/model_q4.onnx                       transformers.js
      onnx/model_q4.onnx_data                  the weights of both graphs

onnxruntime refuses a weights file in `../`. So with transformers.js the weights lie in `onnx/` under the name
that it looks for, and `model.onnx` names them there. Left out: fp16 graphs for WebGPU, weights in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import read_json, write_json
from edgedisp.graph import browser_graph
from edgedisp.graph.genai_config import GENAI_CONFIG
from edgedisp.graph.onnx_graph import DATA, GRAPH, move_weights
from edgedisp.graph.session import at_accuracy_level, open_session

GENAI, WEB, OPTIMUM = "onnxruntime-genai", "transformers.js", "optimum"
LAYOUTS = (GENAI, WEB, OPTIMUM)

ROUNDING = 1e-5  # of the largest logit
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
}
"""How each runtime opens a bundle. `folder`, `parent`, `name` and `text` are the reader's to fill in."""


def arrange(
    bundle: Path, layouts: Sequence[str], precision: str, browser: bool = False
) -> dict[str, dict[str, Any]]:
    """Turn a bundle (graph and weights at its top) into one of the `layouts`, in place.

    `browser`: the graph of transformers.js runs in WebAssembly, so its products are unfolded where they fit.

    Returns layout -> {graph, weights, load}: paths in the bundle, and how its runtime opens it. Of an
    unfolded graph there is {unfolded_bytes}, too: the memory that opening it takes. BadInput for a layout
    that is not known, or whose files this bundle lacks.
    """
    unknown = [name for name in layouts if name not in LAYOUTS]
    if unknown or not layouts:
        raise BadInput(f"layouts: {', '.join(unknown) or 'none given'}; choices: {', '.join(LAYOUTS)}")
    if GENAI in layouts and not (bundle / GENAI_CONFIG).is_file():
        raise BadInput(f"layouts: {GENAI} cannot run this family; there are {WEB}, {OPTIMUM}")
    dtype, suffix = DTYPES[precision]
    web = f"onnx/model{suffix}.onnx"
    weights = f"{web}_data" if WEB in layouts else DATA
    _write_tokenizer_settings(bundle)
    entries: dict[str, dict[str, Any]] = {
        name: {"graph": GRAPH, "weights": weights, "load": LOAD[name].replace("$DTYPE", dtype)}
        for name in LAYOUTS
        if name in layouts
    }
    if WEB in layouts:
        entries[WEB] |= {"graph": web, **_write_web(bundle, web, dtype, browser)}
    if GENAI not in layouts:
        (bundle / GENAI_CONFIG).unlink(missing_ok=True)
    if GENAI not in layouts and OPTIMUM not in layouts:
        (bundle / GRAPH).unlink()
    return entries


def graphs(layouts: dict[str, dict[str, Any]]) -> list[str]:
    """The graph files of an arranged bundle, each once."""
    return list(dict.fromkeys(entry["graph"] for entry in layouts.values()))


def _write_web(bundle: Path, web: str, dtype: str, browser: bool) -> dict[str, int]:
    """Write the graph of transformers.js, and move the weights to where it and the first graph find them.

    Returns {unfolded_bytes}: the memory that opening takes, if its products are unfolded.
    """
    path, data = bundle / web, bundle / f"{web}_data"
    path.parent.mkdir()
    (bundle / DATA).rename(data)
    model = ir.load(bundle / GRAPH)
    move_weights(model, f"{path.parent.name}/{data.name}", bundle)
    ir.save(model, bundle / GRAPH)
    move_weights(model, data.name, path.parent)
    browser_graph.replace_quantized_gathers(model)
    needed = browser_graph.expected_bytes(model.graph, data.stat().st_size)
    is_unfolded = browser and browser_graph.has_packed_products(model.graph) and needed <= WEB_BYTES
    if is_unfolded:
        browser_graph.unfold(model)
    ir.save(model, path)
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
    if _begins_texts(bundle):
        settings["add_bos_token"] = True
    write_json(path, settings)


def _begins_texts(bundle: Path) -> bool:
    """Whether the tokenizer puts a token before a text, as Gemma's does."""
    path = bundle / "tokenizer.json"
    if read_json(path).get("post_processor") is None:
        return False
    tokenizer = Tokenizer.from_file(str(path))
    plain, marked = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    return len(marked) > len(plain) and marked[0] != plain[0]


def logits(path: Path, ids: Sequence[int], threads: int, graph: bytes | None = None) -> NDArray[np.float32]:
    """Logits [tokens, vocab] of a graph file with an empty cache. BuildFailed if it does not open or run.

    `graph`: another graph over the same weights.
    """
    session = open_session(path, threads, graph)
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    try:
        values: NDArray[np.float32] = session.run(["logits"], feed)[0][0]
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BuildFailed(f"{path}: onnxruntime cannot run it: {error}") from error
    return values


def check_same(arranged: Path, files: Sequence[str], bundle: Path, ids: Sequence[int], threads: int) -> None:
    """BuildFailed unless every graph of an arranged bundle gives the logits of `bundle`, bit for bit.

    Of a graph that gives the last position's alone that one is compared, and a graph with unfolded products,
    which multiplies in fp32, is compared with the bundle at accuracy level 0; both to within the rounding of
    another order of summation.
    """
    is_packed = browser_graph.has_packed_products(ir.load(bundle / GRAPH).graph)
    shipped = logits(bundle / GRAPH, ids, threads)
    for name in files:
        values, reference = logits(arranged / name, ids, threads), shipped
        if is_packed and not browser_graph.has_packed_products(ir.load(arranged / name).graph):
            reference = logits(bundle / GRAPH, ids, threads, at_accuracy_level(bundle, 0))
        is_same_work = len(values) == len(shipped) and reference is shipped
        reference = reference[-len(values) :]
        worst = float(np.abs(values - reference).max())
        allowed = 0.0 if is_same_work else ROUNDING * float(np.abs(reference).max())
        if not worst <= allowed:  # NaN fails, too
            raise BuildFailed(f"{arranged}: {name} differs from the bundle that was checked, by {worst:.3g}")
