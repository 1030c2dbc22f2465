"""`DispersionMixin` in front of TRL's supervised Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import Gradients, open_tiny
from transformers import AutoTokenizer, PrinterCallback

from edgedisp import DispersionConfig, DispersionMixin


def test_it_mixes_into_trls_supervised_trainer(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class DispersionSFT(DispersionMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    texts = ["One sentence after another.", "And a third, longer one."] * 8
    vectors = []
    for accumulate in (1, 2):
        gradients = Gradients()
        arguments = trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=4 // accumulate, max_steps=2, max_length=32,
            gradient_accumulation_steps=accumulate, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, gradient_checkpointing=False, max_grad_norm=0.0, disable_tqdm=True,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = DispersionSFT(
            model=open_tiny(tiny_folder["llama"]),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder["llama"]),
            dispersion=DispersionConfig(weight=0.5, tokens=None),
            callbacks=[gradients],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        vectors.append(gradients.seen)
        for row in [row for row in trainer.state.log_history if "loss" in row]:
            assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.5 * row["dispersion"], rel=1e-4)
            assert "mean_token_accuracy" in row  # the host's own figures are still there
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-3, atol=1e-5)  # a big batch, and in two parts
