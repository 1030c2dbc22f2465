"""What a build found, told to people and to programs: report.html, report.md, report.json, plots, model card.

A pure room. Everything is made from ONE summary (a plain dict that the stages gathered); no model is
opened and no run folder is read, so the same summary gives the same bytes.

    reading.py      how a summary is read when parts of it are absent
    wording.py      how figures are written: digits, units, intervals
    before_after.py the table, of one run or several; footnotes.py: below it; rendering.py: as text, Markdown
    every_arm.py    all arms against the baseline, and the spread between seeds
    comparisons.py  paired comparisons and Holm's correction; claims.py: the verdict, by written rules;
                    saying.py: its words
    picture.py      a drawing as SVG, PNG, inline SVG; plots.py, plot_inside.py, plot_condensation.py,
                    plot_survival.py, plot_mixed.py, plot_scores.py, plot_divergence.py: drawings;
                    condensation_page.py: those of
                    `edgedisp condensation --out`
    section.py      the shape of a section; results.py, means.py, divergence.py, shipped.py, mixed.py,
                    survival.py, provenance.py; devices.py, devices_page.py: `edgedisp bench`, and
                    on_devices.py: the same in a run's report
    page.py         all files of the report, HTML through report.html.j2
    card.py         the README of a model folder
    bundle_card.py  the README of a bundle that ships, from its manifest and the summary

The summary, every part of which may be absent or None:

    name, hash8, smoke, created, command, recipe_yaml, git_commit, machine {}, versions {}, arms [],
    precisions []
    model       {base, architecture, license, parameters {embedding, attention, mlp, norm, head, total, tied},
                weights_sha256}
    corpus      {tokens_sha256, train_tokens, train_documents, heldout_documents, epochs, context, sources [],
                license}
    midtrain    {arm: {steps, tokens, seconds, tokens_per_s, peak_memory_bytes, weights_sha256, settings {},
                log [{step, loss, dispersion, lr, grad_norm}], watched [{step, cosine_by_layer,
                embedding_variance, seconds}], watch_seconds, skipped_sequences, chunked_cross_entropy,
                processes;
                with an adapter merged_into, merge_audit {rows, tokens, blocks, grid, decision, chosen, why,
                warning, gains}}}
    condensation {arm: {tokens, sequences, layers [{layer, cosine_raw, cosine_sink_excluded,
                cosine_mean_removed, effective_rank, maximum_explainable_variance, kurtosis, max_over_median,
                max_over_median_sink_excluded, sinks, histogram [counts over cosine -1 to 1],
                intervals {figure: [low, high]}}], final_norm {as a layer}, mean_cosine {value, low, high},
                correlations {spearman, kendall: {value, low, high}}, change {layers [{layer, figure:
                {difference, low, high}}], mean_cosine, correlations}: against the baseline}}
    condensation_bundles {arm: {precision: the same, its change against the arm's torch model}}
    bundles     {arm: {precision: {size_bytes, nodes {}, by_tensor [], search {}}}}: the last where it was
                asked for (mixed.py)
    verify      {arm: {precision: {max_abs_difference, mean_kl, p99_kl, top1_agreement, greedy_agreement,
                tokens, genai {opened, reason}, limits {}, passed}}}
    accuracy    {arm: {precision: {task: {metric, value, low, high, n, documents, higher_is_better, chance,
                metrics {bits_per_byte {value, low, high}}}}}}
    comparison  {arm: {precision: {task: {metric, baseline, arm, difference, low, high, n, documents,
                higher_is_better, p_value, mcnemar_p, nll_difference {difference, low, high}, and over several
                seeds `seeds` (evaluate/seeds.py), in nll_difference as well}}}}; in format 1 without the
                level of arms, its arm being `dispersed`
    means       {arm: {precision: {baseline, arm, difference, low, high, tasks [], left_out {task: why}}}}:
                the mean over tasks (evaluate/means.py)
    noise       {precision: {variants {threads | attention: {difference, low, high}}, floor}}: of the
                baseline, nats per token
    divergence  {arm: {precision: {parent | baseline: {tokens, mean_kl, median_kl, p90_kl, p99_kl, max_kl,
                top1_agreement, top5_overlap, by_position [{start, end, tokens, mean_kl}], worst [{kl,
                context, truth, reference, reference_probability, other, other_probability}]}}}}
    survival    {arm: {precision: {weights {nearest, unmatched [], references {base | baseline:
                {total, bits {}, components {}, layers [{layer}]}}} (quantize/survival.py), loss {task: {full,
                quantized, change {difference, low, high}, kept, correlation, slope {value, low, high},
                verdict}} (evaluate/survival.py)}}}
    seeds       [seed]; techniques {arm: {dispersion {}, neftune, active_forgetting, embedding_dropout}}
    replicas    {folder: {arm, seed, midtrain {}, verify {precision}, accuracy {precision}}}: the trainings
                with other seeds than the first. The first one's stands under the arm's name everywhere else,
                but accuracy and comparison are over all seeds
    missing_tasks {task: why its data could not be had}
    latency     {device, threads, warnings [], pairs [{fault}], rows [{arm, precision, load_s, ttft_ms,
                prefill_tokens_per_s, decode_tokens_per_s, token_ms_p50, token_ms_p90, peak_memory_bytes,
                weights_bytes, spread {figure: {low, high}}, warnings []}]}
    devices     [what was measured later: one result a device (bench/devices.py), each row with `partial`];
                devices_outdated [what is not shown, its bundles having changed]
    not_finite  [paths of figures that were infinite or undefined]
    stages      [{name, seconds, kept}]

All but `write` and `single_page` need the standard library alone: a command line can show a table at once.
"""

from __future__ import annotations

from pathlib import Path

from edgedisp.report.before_after import Table, compare, table
from edgedisp.report.bundle_card import bundle_card
from edgedisp.report.card import model_card
from edgedisp.report.claims import verdict
from edgedisp.report.every_arm import render_arms
from edgedisp.report.mixed import assignment_text
from edgedisp.report.reading import Summary
from edgedisp.report.rendering import render_markdown, render_text

__all__ = [
    "Summary",
    "Table",
    "assignment_text",
    "bundle_card",
    "compare",
    "model_card",
    "render_arms",
    "render_markdown",
    "render_text",
    "single_page",
    "table",
    "verdict",
    "write",
]


def single_page(summary: Summary) -> str:
    """The HTML page alone, pictures within."""
    from edgedisp.report import page  # brings matplotlib and jinja2

    return page.single(summary)


def write(summary: Summary, out: Path) -> list[Path]:
    """Write report.html, report.md, report.json and plots/ into `out`; returns the files (see page.py)."""
    from edgedisp.report import page  # brings matplotlib and jinja2

    return page.write(summary, out)
