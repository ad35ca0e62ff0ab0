"""Sizes of files as people write and read them."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


class Size(click.ParamType):
    """``5GB``, ``500MB``, ``2GiB``; a number alone is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _FORM.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no size; give one like 5GB", param, ctx)
        unit = _UNITS[match[2].lower()]
        size = int(float(match[1]) * (1024 ** list(_UNITS.values()).index(unit) if match[3] else unit))
        if size < 1:
            self.fail("it must be at least 1 byte", param, ctx)
        return size


def human(size: int) -> str:
    """Three digits and a unit."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"
