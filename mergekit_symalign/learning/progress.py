"""What a stopped descent left behind: its state, and what it was a descent of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_symalign.errors import ConfigError
from mergekit_symalign.learning.adam import Moments
from mergekit_symalign.learning.descent import State
from mergekit_symalign.sealed.text import shown
from mergekit_symalign.whole_file import written_whole

_ENTRY = "descent"
_PARTS = ("numbers", "first", "second", "best")


def save_state(path: Path, state: State, what: Mapping[str, Any]) -> None:
    """Write where a descent is; the file appears under its name only when it is whole.

    Args:
        path: of the file.
        state: where it is.
        what: whatever two runs must share for one to go on with the other's state.
    """
    parts = (state.numbers, state.moments.first, state.moments.second, state.best)
    tensors = {
        f"{part} {name}": x.detach().cpu().contiguous().clone()
        for part, of in zip(_PARTS, parts, strict=True)
        for name, x in of.items()
    }
    told = {name: getattr(state, name) for name in ("step", "before", "least", "since")}
    with written_whole(path) as scratch:
        save_file(tensors, scratch, metadata={_ENTRY: json.dumps({"state": told, "what": dict(what)})})


def load_state(path: Path, start: State, what: Mapping[str, Any]) -> State:
    """The state that a stopped descent left.

    Args:
        path: of the file.
        start: of a descent from the beginning; what was saved goes where its numbers are.
        what: see `save_state`.

    Raises:
        ConfigError: if the file cannot be read, or is of another descent.
    """
    remedy = f"Remove {path.parent} to start anew, or name another output"
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})[_ENTRY])
            parts = {
                part: {name: file.get_tensor(f"{part} {name}").to(x.device) for name, x in start.numbers.items()}
                for part in _PARTS
            }
        found, known = told["state"], dict(told["what"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"state {path}", f"it cannot be read ({shown(str(error), 200)})", remedy) from error
    if differing := sorted(key for key in {*what, *known} if known.get(key) != what.get(key)):
        reason = f"a run with another {' and '.join(map(shown, differing))} was stopped there"
        raise ConfigError(f"state {path}", reason, remedy)
    if any(x.shape != start.numbers[name].shape for of in parts.values() for name, x in of.items()):
        raise ConfigError(f"state {path}", "its numbers have other shapes", remedy)
    numbers, first, second, best = (parts[part] for part in _PARTS)
    return replace(start, numbers=numbers, moments=Moments(first, second), best=best, **found)
