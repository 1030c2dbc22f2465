"""The keys of a recipe's `data`: sources of text and of conversations."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import model_validator

from edgedisp.recipe import values
from edgedisp.recipe.values import NUMBER, WHOLE, Flag, Section, Text


class Source(Section):
    """One source of documents or conversations."""

    source: Text
    """the rows: a file, a hub data set, or pypi:name==version/file/in/wheel"""
    text: Text | None = None
    """the field that holds a document's text; null: text, where no field of a conversation is named"""
    messages: Text | None = None
    """the field that holds a conversation: OpenAI messages (role, content, tool_calls) or ShareGPT turns"""
    prompt: Text | None = None
    """the field with what a user asks, and completion beside it: a conversation of two fields"""
    completion: Text | None = None
    """the field with the answer to prompt"""
    tools: Text | None = None
    """the field with the functions that a conversation may call; null: tools, where a row has it"""
    weight: Annotated[float, Gt(0), Le(1000), NUMBER] = 1.0
    """how often an epoch reads its rows; of a fraction, rows are drawn anew in every epoch"""
    sha256: values.Sha256 | None = None
    """what the file must hash to (single files only)"""
    config: Text | None = None
    """configuration of a hub data set"""
    split: Text = "train"
    """split of a hub data set"""
    revision: Text | None = None
    """branch, tag or commit on the hub"""
    limit: values.Count | None = None
    """read at most this many documents; null reads all"""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        kinds = [name for name in ("text", "messages", "prompt") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} are of different kinds; name one of them")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("a conversation of two fields needs both prompt and completion")
        if self.tools is not None and not self.is_chat:
            raise ValueError("tools belong to a conversation; name its field with messages")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the rows are conversations."""
        return self.messages is not None or self.prompt is not None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every row needs."""
        if self.prompt is not None and self.completion is not None:
            return self.prompt, self.completion
        return (self.messages or self.text or "text",)


class Data(Section):
    """What is read, what is held out from training, and how long a sequence is."""

    train: Annotated[tuple[Source, ...], MinLen(1)]
    """the sources, read in this order"""
    heldout: values.Between0And1 = 0.05
    """share of documents kept from training, for scoring"""
    context: Annotated[int, Ge(8), Le(2**20), WHOLE]
    """tokens in one training sequence"""
    isolate_documents: Flag = False
    """in training, no attention from one document of a block to another, and positions anew; always so where
    conversations are read"""
    loss: Literal["answers", "all"] | None = None
    """the tokens that training predicts; null: of conversations the answers, with what ends them"""
    too_long: Literal["drop", "cut"] = "drop"
    """what becomes of a conversation longer than the context: cut drops its oldest turns until it fits"""

    @property
    def has_chat(self) -> bool:
        """Whether a source holds conversations."""
        return any(source.is_chat for source in self.train)

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        if self.loss == "answers" and not all(source.is_chat for source in self.train):
            raise ValueError("loss: answers, but text has none; name messages, or take loss out")
        return self
