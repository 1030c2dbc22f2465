"""One folder that three runtimes open, with its weights stored once.

    bundle/
      genai_config.json                        onnxruntime-genai
      model.onnx                               onnxruntime-genai, optimum
      config.json, generation_config.json      optimum, transformers.js
      tokenizer.json, tokenizer_config.json    all
      onnx/model_q4.onnx                       transformers.js
      onnx/model_q4.onnx_data                  the weights of both graphs

A graph names the file of its weights by a path from its own folder, and onnxruntime refuses one that leaves
that folder (`../`). It takes one that goes down. So where transformers.js is wanted the weights lie in
`onnx/` under the name that this library looks for, and `model.onnx` above names them
`onnx/model_q4.onnx_data`: two small graphs, one file, no link. Without
transformers.js they are `model.onnx.data` beside `model.onnx`.

What the graph of transformers.js has of its own: its default WebAssembly build has no kernel for
`GatherBlockQuantized` (onnxruntime-web 1.31), so standard operators take its place (plain_gather.py), which
give the same numbers bit for bit. For a browser, products are unfolded too (unfold.py), as
long as that fits the 4 GB which WebAssembly can hold. `config.json` tells it which file to take (`dtype`) and
that there are external weights.

optimum needs transformers 4, which does not know the class that transformers 5 writes for its tokenizers; its
older name means the same to all three. A tokenizer that begins every text with a token (Gemma without its
`<bos>` writes nonsense) does so in optimum by itself, in transformers.js if `add_bos_token` says so, and in
onnxruntime-genai if it is asked to; a chat template brings the token along in all of them.

Left out: fp16 graphs for WebGPU, and weights in parts (WebAssembly holds at most 4 GB; these are small).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto
from tokenizers import Tokenizer

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph import layout
from edgedisp.graph.plain_gather import plain_gathers
from edgedisp.graph.session import at_accuracy_level, open_session
from edgedisp.graph.unfold import expected_bytes, holds_packed_products, unfold
from edgedisp.graph.writer import DATA, GRAPH

GENAI, WEB, OPTIMUM = "onnxruntime-genai", "transformers.js", "optimum"
LAYOUTS = (GENAI, WEB, OPTIMUM)

ROUNDING = 1e-5  # of the largest logit
WEB_BYTES = 4_000_000_000  # of memory: WebAssembly reaches 4 GiB

# Precision -> what transformers.js calls it (`dtype`), and the end of its file's name.
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
found = model.generate(**ids, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(found[0], skip_special_tokens=True))""",
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
    if GENAI in layouts and not (bundle / "genai_config.json").is_file():
        others = ", ".join(name for name in LAYOUTS if name != GENAI)
        raise BadInput(f"layouts: {GENAI} cannot run this family; there are {others}")
    dtype, suffix = DTYPES[precision]
    web = f"onnx/model{suffix}.onnx"
    weights = f"{web}_data" if WEB in layouts else DATA
    unfolded = _write_web(bundle, web, dtype, browser) if WEB in layouts else None
    _settle_tokenizer(bundle)
    if GENAI not in layouts:
        (bundle / "genai_config.json").unlink(missing_ok=True)
    if GENAI not in layouts and OPTIMUM not in layouts:
        (bundle / GRAPH).unlink()
    return {
        name: {
            "graph": web if name == WEB else GRAPH,
            "weights": weights,
            "load": LOAD[name].replace("$DTYPE", dtype),
            **({"unfolded_bytes": unfolded} if name == WEB and unfolded else {}),
        }
        for name in LAYOUTS
        if name in layouts
    }


def graphs(layouts: dict[str, dict[str, Any]]) -> list[str]:
    """The graph files of an arranged bundle, each once."""
    return list(dict.fromkeys(entry["graph"] for entry in layouts.values()))


def _write_web(bundle: Path, web: str, dtype: str, browser: bool) -> int | None:
    """The second graph, and the weights under the name that it and the first one use.

    Returns the bytes that opening the graph takes, if its products are unfolded.
    """
    target = bundle / web
    target.parent.mkdir()
    data = target.with_name(f"{target.name}_data")
    (bundle / DATA).rename(data)
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    _point(model.graph, f"{target.parent.name}/{data.name}")
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    _point(model.graph, data.name)
    plain_gathers(model.graph)
    needed = expected_bytes(model.graph, data.stat().st_size)
    unfolded = browser and holds_packed_products(model.graph) and needed <= WEB_BYTES
    if unfolded:
        unfold(model)
    target.write_bytes(model.SerializeToString())
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    config["transformers.js_config"] = {"dtype": dtype, "use_external_data_format": {target.name: 1}}
    layout.dump(bundle / "config.json", config)
    return needed if unfolded else None


def _settle_tokenizer(bundle: Path) -> None:
    """Write what the runtimes would otherwise read in ways of their own; see above."""
    path = bundle / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if _begins_texts(bundle):
        settings["add_bos_token"] = True
    layout.dump(path, settings)


def _begins_texts(bundle: Path) -> bool:
    """Whether the tokenizer puts a token before a text, as Gemma's does."""
    path = bundle / "tokenizer.json"
    if json.loads(path.read_text(encoding="utf-8")).get("post_processor") is None:
        return False
    tokenizer = Tokenizer.from_file(str(path))
    plain, marked = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    return len(marked) > len(plain) and marked[0] != plain[0]


def _point(graph: GraphProto, location: str) -> None:
    """Name the file of the weights."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def logits(
    graph: Path, ids: Sequence[int], threads: int, instead: bytes | None = None
) -> NDArray[np.float32]:
    """Logits [tokens, vocab] of a graph file with an empty cache. BuildFailed if it does not open or run.

    `instead`: another graph over the same weights.
    """
    session = open_session(graph.parent, threads, instead, name=graph.name)
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    try:
        found: NDArray[np.float32] = session.run(["logits"], feed)[0][0]
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BuildFailed(f"{graph}: onnxruntime cannot run it: {error}") from error
    return found


def check_same(arranged: Path, files: Sequence[str], bundle: Path, ids: Sequence[int], threads: int) -> None:
    """BuildFailed unless every graph of an arranged bundle gives the logits of `bundle`, bit for bit.

    A graph may give the last position's alone. That one is compared then, to within the rounding of another
    order of summation: a product of one row has a kernel of its own.

    A graph whose products are unfolded multiplies in fp32, whatever the accuracy level of the bundle. Its
    logits are compared with those of the bundle at level 0, to within such rounding.
    """
    expected = logits(bundle / GRAPH, ids, threads)
    exact: NDArray[np.float32] | None = None
    for name in files:
        found = logits(arranged / name, ids, threads)
        reference = expected
        if _unfolded(bundle / GRAPH, arranged / name):
            if exact is None:
                exact = logits(bundle / GRAPH, ids, threads, at_accuracy_level(bundle, 0))
            reference = exact
        wanted = reference[-len(found) :]
        worst = float(np.abs(found - wanted).max())
        same = len(found) == len(expected) and reference is expected
        allowed = 0.0 if same else ROUNDING * float(np.abs(wanted).max())
        if not worst <= allowed:
            raise BuildFailed(f"{arranged}: {name} differs from the bundle that was checked, by {worst:.3g}")


def _unfolded(source: Path, made: Path) -> bool:
    """Whether packed products of the graph `source` are packed no more in `made`."""
    before, after = (onnx.load(path, load_external_data=False).graph for path in (source, made))
    return holds_packed_products(before) and not holds_packed_products(after)
