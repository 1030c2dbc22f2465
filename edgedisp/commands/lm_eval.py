"""Bundles and torch models as models of lm-evaluation-harness: `edgedisp-onnx` and `edgedisp-torch`.

    python -m edgedisp.commands.lm_eval run --model edgedisp-onnx --model_args bundle=BUNDLE --tasks arc_easy

is lm-eval's own command with the two models known to it; in a program, importing this file makes
`lm_eval.simple_evaluate(model="edgedisp-torch", model_args="folder=FOLDER", ...)` work. Every task runs that
needs log-likelihoods or greedy text. Arguments: `bundle` or `folder`; `threads` (default: the physical
cores); for torch also `device`. Tasks of a folder or file that run Python need `--trust-task-code`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import HarnessCLI, cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.config.evaluate_config import EvaluatorConfig

from edgedisp import models
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files
from edgedisp.evaluate.lm_eval_adapter import HarnessModel
from edgedisp.evaluate.loglikelihood import TextTokenizer
from edgedisp.evaluate.task_suite import check_task_code
from edgedisp.graph.session import OnnxModel

TRUST = "--trust-task-code"


class _FolderModel(HarnessModel):
    """A model with the tokenizer of its folder. options: the arguments that the model has no use for."""

    def __init__(self, model: Any, folder: str, options: dict[str, Any]) -> None:
        # lm-eval's command always gives batch sizes and a device, which have no meaning for a bundle.
        if unknown := ", ".join(options.keys() - {"batch_size", "max_batch_size", "device"}):
            raise BadInput(f"model_args: {unknown}: no such argument; there are bundle or folder, threads")
        super().__init__(model, TextTokenizer(models.load_tokenizer(Path(folder))))


@register_model("edgedisp-onnx")
class OnnxHarnessModel(_FolderModel):
    """A bundle on onnxruntime's CPU provider, in the arithmetic that ships. BadInput for a damaged one."""

    def __init__(self, bundle: str, threads: int | None = None, **options: Any) -> None:
        check_files(Path(bundle))
        super().__init__(OnnxModel(Path(bundle), int(threads or physical_cores())), bundle, options)


@register_model("edgedisp-torch")
class TorchHarnessModel(_FolderModel):
    """A Hugging Face folder in fp32. BadInput for one that holds no model."""

    def __init__(self, folder: str, threads: int | None = None, device: str = "", **options: Any) -> None:
        # lm-eval's command asks for cuda:0 by default.
        model = models.load(Path(folder)).to(device if device and torch.cuda.is_available() else "cpu")
        super().__init__(models.TorchModel(model, int(threads or physical_cores())), folder, options)


def task_files(arguments: Namespace) -> Iterator[Path]:
    """The task files outside lm-eval that its command line names, or the file behind `--config`."""
    settings = vars(arguments)
    if config := settings.get("config"):
        settings = EvaluatorConfig.load_yaml_config(config) | {k: v for k, v in settings.items() if v}
    folders, names = settings.get("include_path") or (), settings.get("tasks") or ()
    for folder in [folders] if isinstance(folders, str | Path) else folders:
        yield from Path(folder).rglob("*.yaml")
    listed = [names] if isinstance(names, str) else map(str, names)
    for name in filter(None, ",".join(listed).split(",")):  # lm-eval splits each entry of a list, too
        yield from [*Path(name).glob("*.yaml"), *map(Path, glob(name))]  # noqa: PTH207  (it may be absolute)


def main() -> None:
    """lm-eval's command; a user's mistake ends it with one message and exit code 2, as our own commands."""
    try:
        if TRUST in sys.argv:
            sys.argv.remove(TRUST)  # lm-eval does not know it
        else:
            check_task_code(task_files(HarnessCLI().parse_args()))
        cli_evaluate()
    except BadInput as error:
        sys.stderr.write(f"edgedisp: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
