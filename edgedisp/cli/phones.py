"""The command that brings bundles to a phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp.cli.app import ItemsOption, JsonOption, LimitOption, TasksPathOption, TextOption, app, width
from edgedisp.core.errors import BadInput
from edgedisp.core.paths import data_folder


@app.command()
def phone(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders made by the export.")],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: this machine's on its network.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8717,
    https: Annotated[
        bool, typer.Option("--https", help="Encrypt, with a certificate made now: allows threads.")
    ] = False,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: chosen on the page, 1 unless changed.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Then score items of these tasks there: heldout ...")
    ] = None,
    items: ItemsOption = None,
    limit: LimitOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    once: Annotated[bool, typer.Option("--once", help="End after the first complete result.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write every result to this JSON file.")] = None,
    report: Annotated[
        bool, typer.Option(help="Keep results in the bundles' run, and show them in its report.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a page for phones: chat with bundles, and time them there; print what phones measured."""
    from edgedisp.bench.devices import BenchOptions
    from edgedisp.bench.page_plan import PagePlan, read_bundle
    from edgedisp.bench.phone import ServeOptions, serve
    from edgedisp.bench.results import label_bundles
    from edgedisp.commands.run_report import check_runs, show_devices
    from edgedisp.core.files import check_files, write_json
    from edgedisp.device_results import keep, places
    from edgedisp.pipeline.run_results import device_result
    from edgedisp.report import devices_text

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise BadInput(f"--out {out}: is a folder, or in one that is not there; name a file")
    for bundle in bundles:
        if bundle.is_dir():
            check_files(bundle)
    labels = label_bundles(bundles)
    served = tuple(read_bundle(label, folder) for label, folder in labels.items())
    in_runs = places(labels) if report else {}
    check_runs(in_runs)
    for run in sorted({place.run for place in in_runs.values()}):
        typer.echo(f"What phones measure joins the report of {run} (--no-report: it does not)", err=True)
    scorer = _scorer(score, labels, items=items, limit=limit, text=text, tasks_path=tasks_path)
    timing = BenchOptions(prompt, generate, repetitions, threads, requests=scorer.requests)
    plan = PagePlan(served, timing)
    kept: list[dict[str, Any]] = []
    unshown: dict[Path, None] = {}

    def arrived(result: dict[str, Any]) -> None:
        result = scorer.told(result)
        kept.append(result)
        if out is not None:  # at once: later phones may come or not
            write_json(out, {"format": 1, "devices": kept})
        if not as_json:
            typer.echo(devices_text([device_result(result)], width()) + "\n")
        keep_in_runs([result])

    def keep_in_runs(found: list[dict[str, Any]]) -> None:
        unshown.update({run: None for result in found for run in keep(result, in_runs)})
        for run in list(unshown):  # with what Ctrl-C kept from being shown before
            typer.echo(show_devices(run), err=True)
            del unshown[run]

    results = serve(
        plan,
        data_folder("export") / "web",
        ServeOptions(host, port, https, once),
        note=lambda line: typer.echo(line, err=True),
        arrived=arrived,
    )
    if not results:
        raise KeyboardInterrupt  # ended before anything came
    told = {result["run"]: result for result in kept}  # scored when they arrived
    results = [("lost" not in one and told.get(one["run"])) or scorer.told(one) for one in results]
    partial = [result for result in results if "lost" in result]
    for result in partial if not as_json else ():
        typer.echo(devices_text([device_result(result)], width()) + "\n")
    if out is not None:
        write_json(out, {"format": 1, "devices": results})
        typer.echo(f"results: {out}", err=True)
    if as_json:
        typer.echo(json.dumps({"format": 1, "devices": results}, ensure_ascii=False))
    keep_in_runs(partial)


class _Scorer:
    """What phones are asked to score, and what is said of their answers; nothing where nothing is asked."""

    def __init__(self, questions: Any = None) -> None:
        self._questions = questions
        self.requests: dict[str, Any] = {} if questions is None else questions.requests

    def told(self, result: dict[str, Any]) -> dict[str, Any]:
        """A phone's result with scores in the place of its answers."""
        if self._questions is None or "answers" not in result:
            return result
        from edgedisp.bench.system import physical_cores
        from edgedisp.core.progress import Screen
        from edgedisp.stages.device_scores import with_scores

        with Screen("scores here") as screen:
            found = with_scores(self._questions, [result], physical_cores(), screen.progress)
        return {**found["devices"][0], "scored": found["scored"]}


def _scorer(score: str | None, bundles: dict[str, Path], **options: Any) -> _Scorer:
    if score is None and not any(options.values()):  # what makes questions takes seconds to load
        return _Scorer()
    from edgedisp.data import cache_folder
    from edgedisp.stages.device_scores import prepared, wished

    wish = wished(score, **options)
    return _Scorer() if wish is None else _Scorer(prepared(wish, bundles, cache_folder()))
