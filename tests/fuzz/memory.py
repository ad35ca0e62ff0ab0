"""How much memory a call takes: a limit that it cannot exceed, and its peak where the system tells."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIMIT = 1 << 30  # of address space, above what is in use


class Peak:
    """Bytes that a process took above what it had; None where that cannot be measured."""

    bytes: int | None = None


@contextmanager
def guarded() -> Iterator[Peak]:
    """Run with little room: whoever asks for more gets an error. Measures the peak (Linux)."""
    peak = Peak()
    before = _reset()
    with _limited():
        yield peak
    if before is not None:
        peak.bytes = max(0, _kib("VmHWM") * 1024 - before)


def _reset() -> int | None:
    """Set the peak back to what is in use; returns that."""
    try:
        _CLEAR.write_text("5", "utf-8")
    except OSError:
        return None
    return _kib("VmRSS") * 1024


@contextmanager
def _limited() -> Iterator[None]:
    if importlib.util.find_spec("resource") is None:  # Windows
        yield
        return
    resource = importlib.import_module("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if _STATUS.exists():
        resource.setrlimit(resource.RLIMIT_AS, (_kib("VmSize") * 1024 + LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _kib(name: str) -> int:
    line = next(line for line in _STATUS.read_text("utf-8").splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])
