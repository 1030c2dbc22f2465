"""`DispersionTrainer` and `DispersionMixin` in other hands: any data set, sampler, model and Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import Gradients, flat, open_tiny
from transformers import PrinterCallback, Trainer, TrainingArguments

from edgedisp import DispersionConfig, DispersionLoss, DispersionTrainer
from edgedisp.dispersion.losses import VARIANTS
from edgedisp.train.chunked_cross_entropy import chunked_head

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


@pytest.mark.parametrize("loss_kwargs", [True, False])
@pytest.mark.parametrize(("masked", "tokens"), [(True, None), (False, 6)])
def test_micro_batches_are_one_big_batch(
    tiny_folder: dict[str, Path], tmp_path: Path, loss_kwargs: bool, masked: bool, tokens: int | None
) -> None:
    """Of 4, 4 and 2 sequences, where the model's loss is told of the whole step; else of equal sizes."""
    rows = rows_of([12, 7, 12, 3, 12, 1, 8, 12, 5, 12]) if masked else without_masks(rows_of([12] * 10))
    runs = []
    for batch, accumulate in ((10, 1), (4, 3)) if loss_kwargs else ((8, 1), (2, 4)):
        model = open_tiny(tiny_folder["llama"])
        model.accepts_loss_kwargs = loss_kwargs
        if not loss_kwargs:
            rows = without_masks(rows_of([12] * 8))  # else each micro-batch has a mean of its own
        trainer, gradients = run(
            model,
            rows,
            tmp_path,
            DispersionConfig(weight=2.0, tokens=tokens),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            max_steps=-1,
        )
        assert trainer.model_accepts_loss_kwargs is loss_kwargs
        runs.append((gradients.seen[0], train_logs(trainer)[0]))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-6)
    for name in ("loss", "cross_entropy", "dispersion"):
        assert runs[1][1][name] == pytest.approx(runs[0][1][name], rel=1e-5), name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_five_padded_and_accumulated_steps_are_those_of_plain_torch(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Loss, term, gradient norm and weights; plain torch sees one sequence at a time, without its padding."""
    rows = rows_of([12, 7, 12, 3, 9, 2, 10, 12, 4, 12] * 3)
    ours, plain = open_tiny(tiny_folder[architecture]), open_tiny(tiny_folder[architecture])
    for module in (*ours.modules(), *plain.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 5}
    options |= {"weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0, "warmup_steps": 2}
    # GPT-2's key biases have no gradient but rounding errors, which AdamW would divide by themselves.
    options |= {"lr_scheduler_type": "cosine", "adam_epsilon": 1e-6}
    with chunked_head(ours) as is_chunked:
        trainer, _ = run(ours, rows, tmp_path, DispersionConfig(weight=0.7, tokens=None), **options)
    assert is_chunked

    decayed = [{"params": [p for p in plain.parameters() if (p.dim() > 1) == big]} for big in (True, False)]
    decayed[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(decayed, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for step, logged in enumerate(train_logs(trainer)):
        sequences = [row["input_ids"][row["attention_mask"] == 1] for row in rows[6 * step : 6 * step + 6]]
        targets, loss, term = sum(len(ids) - 1 for ids in sequences), 0.0, 0.0
        for ids in sequences:
            outputs = plain.train()(ids[None], output_hidden_states=True)
            cross_entropy = F.cross_entropy(outputs.logits[0, :-1], ids[1:], reduction="sum") / targets
            layers = torch.stack(outputs.hidden_states[1:]).squeeze(1)
            dispersion = VARIANTS["angular"](layers, clamp=0.1).mean() / 6
            (cross_entropy + 0.7 * dispersion).backward()
            loss, term = loss + cross_entropy.item(), term + dispersion.item()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 3)) / 2)
        optimizer.step()
        optimizer.zero_grad()
        assert logged["cross_entropy"] == pytest.approx(loss, rel=1e-5)
        assert logged["dispersion"] == pytest.approx(term, rel=1e-5)
        assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=0, atol=1e-5)


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
