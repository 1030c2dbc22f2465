"""`edgedisp export`: a model folder becomes a bundle for a device profile, opened and checked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgedisp import data, models
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import APP, MANIFEST, check_files, check_writable, read_json
from edgedisp.core.progress import Progress
from edgedisp.graph.architectures import check_export
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.runtime_layouts import LAYOUTS
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import check_bundle
from edgedisp.pipeline.bundles import CARD, provenance_of, write_package
from edgedisp.pipeline.options import PackageOptions
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.recipe import BITS, load_target
from edgedisp.recipe.values import choice
from edgedisp.report.cards import bundle_card


def export_bundle(
    folder: Path, target_name: str, out: Path, progress: Progress, layouts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Export a Hugging Face folder to a bundle for a device profile; `out` appears whole or not at all.

    `layouts` None: the profile's. The folder is opened and saved as the base of a build is. Raises BadInput
    for an unknown target or layout, a folder that no build would open, or an `out` that exists.
    """
    target = load_target(target_name)
    for name in layouts or ():
        try:
            choice(name, LAYOUTS)
        except ValueError as problem:
            raise BadInput(f"--layouts: '{name}' is not known; {problem}") from None
    if out.exists():
        raise BadInput(f"{out}: exists already; choose another --out")
    check_writable("--out", out)
    check_files(folder)
    check_export(models.empty_model(folder))
    model, tokenizer = models.open_base(folder, progress=progress)
    threads, names = target.threads or physical_cores(), layouts or target.layouts
    with _partial(out.resolve()) as partial:
        opened, fp32, quantized, package = (
            partial / name for name in ("model", "fp32", "quantized", "package")
        )
        for path in (opened, fp32, quantized, package):
            path.mkdir()
        models.save(model, tokenizer, opened)
        if (folder / APP).is_file():
            shutil.copyfile(folder / APP, opened / APP)
        del model
        progress(0, 3, "writing the graph")
        grid = export_graph(opened, fp32, threads=threads, max_context=target.context, progress=progress)
        bundle = fp32 if target.precision == "fp32" else quantized
        if bundle is quantized:
            fields = target.quantize.model_dump()
            grid = quantize_bundle(fp32, bundle, bits=BITS[target.precision], **fields, progress=progress)
        text = data.synthetic_documents(1, seed=0)[0].text
        ids = models.encode(tokenizer, text)
        checked = check_bundle(OnnxModel(bundle, threads), [ids[:8], ids[:24]], texts=[text])
        target = target.model_copy(update={"layouts": [name for name in LAYOUTS if name in names]})
        options = PackageOptions(target, threads, provenance_of(folder))
        folders = {"model": opened, "licence_dir": folder, "output_dir": package}
        record = write_package(options, grid, bundle, **folders)
        card = bundle_card(read_json(package / MANIFEST), out.name)
        (package / CARD).write_text(card, encoding="utf-8")
        package.rename(out)
    return {**record, "checked": checked}


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """The empty folder `<out>.partial`, removed at the end; what a killed export left there goes, too.

    Raises BadInput where another export is writing there, or where it holds something else.
    """
    partial = out.with_name(f"{out.name}.partial")
    lock = FileLock(partial / ".lock")
    if partial.is_dir() and not (partial / ".lock").exists() and any(partial.iterdir()):
        raise BadInput(f"{partial}: is needed for unfinished files and holds others; choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"{partial}: another export is writing there; choose another --out") from None
    try:
        _remove_folders(partial)
        yield partial
    finally:
        _remove_folders(partial)  # before .lock, which says whose they are
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _remove_folders(place: Path) -> None:
    for folder in filter(Path.is_dir, place.glob("*")):
        shutil.rmtree(folder)
