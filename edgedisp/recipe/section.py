"""What all sections of a recipe are."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe. Frozen, and a key that is not known is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
