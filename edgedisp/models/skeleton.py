"""A model without its weights: every module with its shape, from the configuration alone.

It costs a second and no memory, so sizes can be told before anything is downloaded or opened. Parameters are
on the meta device; buffers (rotary frequencies, embedding scales) are small, computed from the configuration,
and real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from edgedisp.core.errors import BadInput
from edgedisp.models import hub
from edgedisp.models.loading import quiet


def empty_model(
    base: Path | str, *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder, a .gguf file or a hub id (whose config.json is then all that is fetched).

    Raises BadInput: no such model, hub unreachable, a configuration that cannot be used.
    """
    path = Path(base)
    if isinstance(base, str) and not path.exists():
        path = hub.configuration(base, revision)
    place, named = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    return _empty(_config(place, str(base), trust_remote_code, named))


def _config(folder: Path, name: str, trust_remote_code: bool, named: dict[str, str]) -> Any:
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **named)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as problem:
            first = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise BadInput(f"{name}: its configuration cannot be used: {first[:300]}") from problem


def _empty(config: Any) -> nn.Module:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with quiet(), init_empty_weights():
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as problem:
            first = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise BadInput(
                f"a model of type {config.model_type!r} cannot be made: {first[:300]}"
            ) from problem
    model.tie_weights()  # moving a parameter to the meta device takes it out of the head that shares it
    found: nn.Module = model.eval()
    return found
