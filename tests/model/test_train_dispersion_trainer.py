"""`DispersionTrainer` and `DispersionMixin` in other hands: any data set, sampler, model and Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Gradients, open_tiny
from transformers import PrinterCallback, Trainer, TrainingArguments

from edgedisp import DispersionConfig, DispersionLoss, DispersionTrainer

Rows = list[dict[str, Tensor]]


def rows_of(lengths: Sequence[int], tokens: int = 12) -> Rows:
    """Right-padded sequences with that many real tokens, without labels on the padding."""
    stream = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 400, (tokens,), generator=stream)
        mask = (torch.arange(tokens) < length).long()
        rows.append({"input_ids": ids, "labels": ids.where(mask == 1, -100), "attention_mask": mask})
    return rows


def without_masks(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if name != "attention_mask"} for row in rows]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        **changes,
    }
    return TrainingArguments(output_dir=str(folder), **options)


def run(
    model: Any, rows: Rows, folder: Path, dispersion: Any = None, **changes: Any
) -> tuple[DispersionTrainer, Gradients]:
    gradients = Gradients()
    changes = {"max_grad_norm": 0.0, **changes}
    trainer = DispersionTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows,  # type: ignore[arg-type]
        dispersion=dispersion,
        callbacks=[gradients],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, gradients


def train_logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def test_loss_is_cross_entropy_plus_weight_times_dispersion_each_logged_apart(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    rows = rows_of([12, 9, 12, 5])
    model = open_tiny(tiny_folder["llama"])
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    term = DispersionLoss(DispersionConfig(weight=0.7, tokens=None))
    with term.watch(model):
        cross_entropy = float(model(**batch).loss.detach())
        dispersion = float(term.loss().detach())
    trainer, _ = run(model, rows, tmp_path, DispersionConfig(weight=0.7, tokens=None))
    (logged,) = train_logs(trainer)
    assert logged["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert logged["dispersion"] == pytest.approx(dispersion, rel=1e-5)
    assert logged["loss"] == pytest.approx(cross_entropy + 0.7 * dispersion, rel=1e-5)
    assert "skipped_sequences" not in logged


@pytest.mark.parametrize(("loss_kwargs", "tokens"), [(True, 6), (False, None)])
def test_micro_batches_are_one_big_batch_for_both_kinds_of_models(
    tiny_folder: dict[str, Path], tmp_path: Path, loss_kwargs: bool, tokens: int | None
) -> None:
    rows = without_masks(rows_of([12] * 16))
    runs = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = open_tiny(tiny_folder["llama"])
        model.accepts_loss_kwargs = loss_kwargs
        trainer, gradients = run(
            model,
            rows,
            tmp_path,
            DispersionConfig(weight=0.7, tokens=tokens),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
        )
        assert trainer.model_accepts_loss_kwargs is loss_kwargs
        runs.append((gradients.seen, train_logs(trainer)))
    for big, small in zip(runs[0][0], runs[1][0]):
        torch.testing.assert_close(small, big, rtol=1e-4, atol=1e-6)
    for name in ("loss", "cross_entropy", "dispersion"):
        for big, small in zip(runs[0][1], runs[1][1]):
            assert small[name] == pytest.approx(big[name], rel=1e-5), name


@pytest.mark.parametrize("masked", [True, False])
def test_uneven_micro_batches_count_by_their_sequences(
    tiny_folder: dict[str, Path], tmp_path: Path, masked: bool
) -> None:
    # Micro-batches of 4, 4 and 2 sequences; with masks, one sequence has no pair of tokens.
    rows = rows_of([12, 7, 12, 3, 12, 1, 8, 12, 5, 12]) if masked else without_masks(rows_of([12] * 10))
    runs = []
    for batch, accumulate in ((10, 1), (4, 3)):
        trainer, gradients = run(
            open_tiny(tiny_folder["qwen3"]),
            rows,
            tmp_path,
            DispersionConfig(weight=2.0, tokens=None),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            max_steps=-1,
        )
        runs.append((gradients.seen[0], train_logs(trainer)[0]))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-6)
    for name in ("cross_entropy", "dispersion"):
        assert runs[1][1][name] == pytest.approx(runs[0][1][name], rel=1e-5)
    for index in (0, 1):
        assert runs[index][1].get("skipped_sequences", 0) == masked


def test_evaluation_is_the_plain_trainers(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    rows: Any = rows_of([12, 9, 12, 5])
    options = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    logs = []
    for kind, more in ((Trainer, {}), (DispersionTrainer, {"dispersion": DispersionConfig(weight=9.0)})):
        trainer: Any = kind(
            model=open_tiny(tiny_folder["llama"]),
            args=arguments(tmp_path, **options),
            train_dataset=rows,
            eval_dataset=rows,
            **more,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "eval_loss" in row])
        assert trainer.evaluate()["eval_loss"] == logs[-1][0]["eval_loss"]  # also outside of training
    assert logs[0][0]["eval_loss"] == logs[1][0]["eval_loss"]
    assert not {"dispersion", "cross_entropy"} & set(logs[1][0])


def test_several_gpus_in_one_process_are_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    rows: Any = rows_of([12] * 4)
    with pytest.raises(ValueError, match=r"DataParallel.*torchrun"):
        DispersionTrainer(
            model=open_tiny(tiny_folder["llama"]),
            args=args,
            train_dataset=rows,
            dispersion=DispersionConfig(),
        )
