"""The code of docs/phone_app.md and export/apps, run as it stands: each gives onnxruntime's greedy tokens.

Kotlin and Swift are not among it: nothing here compiles them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from browsers import (
    NODE_MODULES,
    TOP,
    export_all_layouts,
    in_chromium,
    needs_chromium,
    needs_node,
    needs_playwright,
    output,
    text_model,
    with_node_modules,
)

from edgedisp.graph.session import OnnxModel
from edgedisp.models import load_tokenizer
from edgedisp.models.tiny_model import CHAT_TEMPLATE

APPS = TOP / "export" / "apps"
PAGE = (TOP / "docs" / "phone_app.md").read_text(encoding="utf-8")
LINES = [
    "Soukelwick",
    "a",
]  # the first answer ends by itself; with it, the second question outgrows the context
ANSWER = 40  # tokens, where the caller decides; then all fits


SYSTEM = [{"role": "system", "content": "a"}]
TOOLS = [{"type": "function", "function": {"name": "b", "description": "c", "parameters": {}}}]
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}" + CHAT_TEMPLATE
)


def chat_bundle(root: Path, for_browser: bool) -> Path:
    text_model("llama", root / "model")
    (root / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "model" / "app.json").write_text(json.dumps({"system": "a", "tools": TOOLS}))
    return export_all_layouts(root / "model", "int4", root, for_browser).folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In all layouts, with a chat template, a system prompt and a tool."""
    return chat_bundle(tmp_path_factory.mktemp("app"), for_browser=False)


def block(name: str) -> str:
    """The fenced block of the page whose first line names the file."""
    (text,) = re.findall(rf"```\w+\n(?:#|//) {re.escape(name)}\b.*?\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(text)


def words(answers: list[str]) -> list[list[str]]:
    return [answer.split() for answer in answers]


def expected(bundle: Path, most: int | None = None) -> list[list[str]]:
    """The words that onnxruntime answers to LINES, within the context by the page's rule."""
    tokenizer, model = load_tokenizer(bundle), OnnxModel(bundle, 1)
    most = most or min(256, model.context // 2)
    messages = list(SYSTEM)
    answers: list[str] = []

    def prompt() -> list[int]:
        options = {"tools": TOOLS, "add_generation_prompt": True, "return_dict": True}
        return list(tokenizer.apply_chat_template(messages, **options)["input_ids"])

    for line in LINES:
        messages.append({"role": "user", "content": line})
        while len(prompt()) > model.context - most and len(messages) > 3:
            del messages[1:3]
        tokens = model.greedy(prompt(), most, model.end_ids)
        assert answers or tokens[-1] in model.end_ids
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return words(answers)


@pytest.mark.parametrize(
    ("program", "name"), [(sys.executable, "chat.py"), pytest.param("node", "chat.mjs", marks=needs_node)]
)
def test_programs_of_the_page_answer_as_onnxruntime(
    bundle: Path, tmp_path: Path, program: str, name: str
) -> None:
    (with_node_modules(tmp_path) / name).write_text(block(name))
    answers = output([program, name, bundle], tmp_path, "\n".join(LINES))
    assert answers.split() == [word for answer in expected(bundle) for word in answer]


@needs_node
@needs_playwright
@needs_chromium
def test_a_page_answers_in_a_worker(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    web_bundle = chat_bundle(tmp_path_factory.mktemp("web"), for_browser=True)
    request = json.dumps({"name": web_bundle.name, "tools": TOOLS, "most": ANSWER})
    shutil.copyfile(APPS / "worker.mjs", tmp_path / "worker.mjs")
    (tmp_path / "page.mjs").write_text(f"""
        const worker = new Worker("/worker.mjs", {{ type: "module" }});
        let [messages, pieces] = [{json.dumps(SYSTEM)}, ""];
        const ask = (messages) => new Promise((resolve, reject) => {{
          worker.onmessage = ({{ data }}) => {{
            if (data.piece) pieces += data.piece;
            if (data.messages) resolve(data.messages);
            if (data.error) reject(new Error(data.error));
          }};
          worker.postMessage({{ ...{request}, messages }});
        }});
        for (const content of {json.dumps(LINES)})
          messages = await ask([...messages, {{ role: "user", content }}]);
        export default [messages.filter((m) => m.role === "assistant").map((m) => m.content), pieces];
    """)
    contents, pieces = in_chromium(tmp_path / "page.mjs", web_bundle.parent)["result"]
    answers = expected(web_bundle, ANSWER)
    assert words(contents) == answers
    assert "".join(pieces.split()) == "".join(word for answer in answers for word in answer)


@needs_node
def test_the_loop_for_react_native_gives_the_tokens_in_node(bundle: Path, tmp_path: Path) -> None:
    code = (APPS / "answer.mjs").read_text()
    assert code.count('"onnxruntime-react-native"') == 1
    code = code.replace('"onnxruntime-react-native"', '"onnxruntime-node"')
    (with_node_modules(tmp_path) / "answer.mjs").write_text(code)
    (tmp_path / "ask.mjs").write_text(f"""
        import {{ readFile }} from "node:fs/promises";
        import {{ answer, open }} from "./answer.mjs";
        const folder = process.argv[2];
        const session = await open(folder, (name) => readFile(`${{folder}}/${{name}}`, "utf8"));
        const [messages, answers] = [[], []];
        for (const content of {json.dumps(LINES)}) {{
          messages.push({{ role: "user", content }});
          let pieces = "";
          answers.push(await answer(session, messages, {ANSWER}, (piece) => (pieces += piece)));
          if (pieces !== answers.at(-1)) throw new Error(pieces);
          messages.push({{ role: "assistant", content: answers.at(-1) }});
        }}
        console.log(JSON.stringify(answers));
    """)
    answers = json.loads(output(["node", "ask.mjs", bundle], tmp_path))
    assert words(answers) == expected(bundle, ANSWER)


@needs_node
def test_transformers_js_gives_the_ids_of_the_example(bundle: Path, tmp_path: Path) -> None:
    example = json.loads((bundle / "app.json").read_text())["example"]
    (with_node_modules(tmp_path) / "ids.mjs").write_text(f"""
        import {{ AutoTokenizer, env }} from "@huggingface/transformers";
        env.localModelPath = {json.dumps(f"{bundle.parent}/")};
        const tokenizer = await AutoTokenizer.from_pretrained({json.dumps(bundle.name)});
        const {{ messages, tools }} = {json.dumps(example)};
        const encoding = {{ tools, add_generation_prompt: true, return_dict: false, return_tensor: false }};
        console.log(JSON.stringify(tokenizer.apply_chat_template(messages, encoding)));
    """)
    assert example["tools"] == TOOLS
    assert json.loads(output(["node", "ids.mjs"], tmp_path)) == example["prompt_ids"]


@needs_node
def test_the_files_and_versions_that_the_page_names_are_right(bundle: Path) -> None:
    for row in re.findall(r"(?:N|W): (.*?) \|", PAGE):
        for name in re.findall(r"`([^`]+)`", row):
            assert (bundle / name).exists(), name
    for package in ("@huggingface/transformers", "@huggingface/tokenizers", "@huggingface/jinja"):
        version = json.loads((NODE_MODULES / package / "package.json").read_text())["version"]
        assert f'{package}": "{version}"' in PAGE or f"{package}@{version}" in PAGE
