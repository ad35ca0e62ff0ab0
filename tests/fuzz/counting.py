"""What became of files that were changed at random."""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.memory import guarded


def counted(
    count: int, seed: str, draw: Callable[[random.Random, Path], tuple[Any, str]], judged: Callable[[Any, Path], str]
) -> dict[str, int]:
    """Draw and judge so many files.

    Args:
        count: how many.
        seed: of all that is drawn.
        draw: writes a changed file, and says for which case and what was changed.
        judged: ``refused``, ``exact``, or what else happened.

    Returns:
        How many were tried, refused by name, exact, and anything else (which is a fault); and the most memory that one
        of them took, in KiB (0 where the system does not tell).
    """
    result = Counter({"tried": 0, "refused": 0, "exact": 0, "other": 0, "memory_kib": 0})
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            path = Path(folder) / "changed.safetensors"
            of, how = draw(random.Random(f"{seed} {i}"), path)
            with guarded() as peak:
                verdict = judged(of, path)
            result["tried"] += 1
            result[verdict if verdict in result else "other"] += 1
            result["memory_kib"] = max(result["memory_kib"], (peak.bytes or 0) // 1024)
            if verdict not in result:
                print(f"seed {seed}, file {i}, {of.layout.family.name}, {how}: {verdict}", file=sys.stderr, flush=True)
    return dict(result)
