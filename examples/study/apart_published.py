"""Part 9: losses that the published code gave on the same models, read from files.

Theus et al. 2025, github.com/antoniohonsell/Generalized-LMC-for-Transformers. The code needs another version of
transformers and is not part of this project. A file ``<pair>-<arm>.json`` holds the losses at the 11 points on the same
windows: ``{"path": [...], "seconds": 12.3}``.
"""

from __future__ import annotations

import json
from pathlib import Path

from .apart_merges import rise
from .store import Row

MATCHED, LEARNED = "published", "published-learned"


def published(folder: Path, number: int) -> dict[str, Row]:
    """By arm, what is there for a pair."""
    paths = {arm: folder / f"{number}-{arm}.json" for arm in (MATCHED, LEARNED)}
    found = {arm: json.loads(path.read_text("utf-8")) for arm, path in paths.items() if path.exists()}
    return {arm: {"barrier": rise(x["path"]), "path": x["path"], "seconds": x["seconds"]} for arm, x in found.items()}
