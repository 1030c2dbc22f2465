"""Records of core/results.py to JSON and back.

A file of the wrong shape raises ValueError with the path of the faulty value, so no reader indexes a dict and
hopes. Figures that are not finite are written as null.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

Result = TypeVar("Result")


def to_json(result: Any) -> Any:
    """Plain JSON of a record; figures that are not finite become None, tuples lists."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {part.name: to_json(getattr(result, part.name)) for part in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {str(key): to_json(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    if isinstance(result, float) and not math.isfinite(result):
        return None
    return result


def from_json(kind: type[Result], data: Any) -> Result:
    """A record from JSON. Raises ValueError naming every value of the wrong type by its path."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg']}" for one in error.errors()]
        raise ValueError("; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")) from None
