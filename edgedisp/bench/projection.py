"""What a bundle may decode on a chip that nobody has at hand: a range, and no measurement.

Decoding a token reads every weight once, so memory bandwidth bounds it: tokens/s <= bandwidth / bytes read
per token. How near to that bound a model comes is another matter: below 500M parameters a step is so short
that calls, threads and small products take the larger part, and published speeds reach less than a third.
So the bound is multiplied by the least and the largest share that measured devices reached, those of
`export/socs.yaml` (each with its source) and those of the user's own measurements on a chip that is listed.

The result is kept apart from measured rows everywhere. Left out: prefill, which computing bounds, and heat,
which takes 20 % off within minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from edgedisp.core.errors import BadInput


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Soc(_Strict):
    """A chip, and the theoretical peak of its memory in GB/s (1e9 bytes)."""

    name: str
    devices: str
    bandwidth_gb_per_s: PositiveFloat
    source: str = Field(min_length=8)


class Measured(_Strict):
    """A decode speed that someone measured on a chip of the table."""

    soc: str
    model: str
    decode_tokens_per_s: PositiveFloat
    bytes_read_per_token: PositiveInt
    source: str = Field(min_length=8)


class Table(_Strict):
    """`export/socs.yaml`."""

    socs: tuple[Soc, ...] = Field(min_length=1)
    measured: tuple[Measured, ...] = Field(min_length=1)


def load_table(path: Path) -> Table:
    """Raises BadInput for a table that is not as it must be, with the first fault and its place."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        table = Table.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except (OSError, YAMLError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    known = [soc.name for soc in table.socs]
    for one in table.measured:
        if one.soc not in known:
            raise BadInput(f"{path}: measured: '{one.soc}' is none of the socs ({', '.join(known)})")
    return table


def shares(table: Table, own: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """{of, share, source} of each measured device: the part of its peak bandwidth that decoding used.

    own: rows of one's own, {soc, label, decode_tokens_per_s, bytes_read_per_token}; those on a chip that the
    table does not list tell nothing and are left out.
    """
    peak = {soc.name: soc.bandwidth_gb_per_s * 1e9 for soc in table.socs}
    found = []
    for one in table.measured:
        used = one.decode_tokens_per_s * one.bytes_read_per_token
        found.append({"of": f"{one.model} on {one.soc}", "share": used / peak[one.soc], "source": one.source})
    for row in own:
        if row["soc"] in peak:
            used = row["decode_tokens_per_s"] * row["bytes_read_per_token"]
            share = {"of": f"{row['label']} on {row['soc']}", "share": used / peak[row["soc"]]}
            found.append({**share, "source": "measured here"})
    return found


def project(
    bytes_read_per_token: int, table: Table, own: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """{soc, devices, low, high, bound} of every chip, decode tokens/s, the fastest first.

    `low` and `high` are the bound (bandwidth / bytes) times the least and the largest share seen.
    """
    if bytes_read_per_token < 1:
        raise ValueError(f"bytes_read_per_token is {bytes_read_per_token}; a token reads at least one byte")
    seen = [one["share"] for one in shares(table, own)]
    rows = []
    for soc in sorted(table.socs, key=lambda one: -one.bandwidth_gb_per_s):
        bound = soc.bandwidth_gb_per_s * 1e9 / bytes_read_per_token
        row = {"soc": soc.name, "devices": soc.devices, "bound": bound}
        rows.append({**row, "low": bound * min(seen), "high": bound * max(seen), "source": soc.source})
    return rows
