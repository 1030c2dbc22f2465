"""`DispersionMixin` in front of TRL's supervised Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import Gradients, open_tiny
from transformers import AutoTokenizer, PrinterCallback

from edgedisp import DispersionConfig, DispersionMixin


def test_it_mixes_into_trls_supervised_trainer(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class DispersionSFT(DispersionMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    texts = datasets.Dataset.from_dict(
        {"text": ["One sentence after another.", "And a third, longer one."] * 8}
    )
    seen = []
    for accumulate in (1, 2):
        model = open_tiny(tiny_folder["llama"])
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder["llama"])
        gradients = Gradients()
        trainer = DispersionSFT(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4 // accumulate,
                gradient_accumulation_steps=accumulate,
                max_steps=2,
                max_length=32,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                max_grad_norm=0.0,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=texts,
            processing_class=tokenizer,
            dispersion=DispersionConfig(weight=0.5, tokens=None),
            callbacks=[gradients],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seen.append(gradients.seen)
        for row in [row for row in trainer.state.log_history if "loss" in row]:
            assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.5 * row["dispersion"], rel=1e-4)
            assert "mean_token_accuracy" in row  # the host's own figures are still there
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-5)  # a big batch, and in two parts
