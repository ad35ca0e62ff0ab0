"""Files of results: what was measured, on which machine. docs/performance.md has its tables from them."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Cost

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
KINDS = ("whole", "depth", "growth", "layers")  # lists of lines in a file of results
UNITS = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")  # what decides how fast products are


def machine() -> dict[str, Any]:
    """Processor, what it has for products, threads, torch, and numba if the extra ``fast`` is installed."""
    name, flags = _cpu()
    units = [unit for unit in UNITS if unit in flags]
    return {
        "processor": name,
        "units": units,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "torch": torch.__version__,
        "numba": version("numba") if find_spec("numba") else None,
    }


def save(file: Path, found: dict[str, Any]) -> None:
    """What a run found joins what the file has of other runs on this machine, line by line."""
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for kind in KINDS:
        lines = {x["name"]: x for x in [*known.get(kind, []), *found.get(kind, [])]}
        found = {**found, **({kind: list(lines.values())} if lines else {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**known, **found}, indent=1) + "\n", "utf-8")


def whole(name: str, plain: Sequence[Cost], aligned: Sequence[Cost]) -> dict[str, Any]:
    """A line of whole merges: every run, and medians of the ratios of runs that followed each other."""

    def side(costs: Sequence[Cost]) -> list[dict[str, float]]:
        return [{f: round(getattr(c, f), 2) for f in ("wall", "cpu", "peak_rss", "peak_own")} for c in costs]

    fields = ("wall", "cpu", "peak_rss", "peak_own")
    ratios = {
        f: round(median(getattr(a, f) / getattr(p, f) for p, a in zip(plain, aligned, strict=True)), 3) for f in fields
    }
    return {
        "name": name,
        "plain": side(plain),
        "aligned": side(aligned),
        "ratio": ratios,
        "settled_by": dict(sum((c.routes for c in aligned[:1]), Counter())),
    }


def _cpu() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())
