"""Names of files that every operating system takes."""

from __future__ import annotations

import re

_SEPARATORS = re.compile(r"[/\\]")
_REFUSED = re.compile(r'[<>:"|?*\x00-\x1f]')  # by Windows
_DEVICES = frozenset(("con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))))


def file_stem(model: str) -> str:
    """The last part of a model's name or path, as the name of a file without its suffix.

    ``org/name``, ``./folder/name/`` and ``C:\\folder\\name`` all give ``name``; ``a+b`` gives ``a-b``. What Windows
    refuses in names becomes ``-``, and a name that is a device there (``aux``) gets a ``-`` behind it.
    """
    last = _SEPARATORS.split(model.rstrip("/\\"))[-1]
    name = _REFUSED.sub("-", last.replace("+", "-")).rstrip(". ")
    reserved = name.partition(".")[0].lower() in _DEVICES
    return f"{name}-" if reserved else name or "model"
