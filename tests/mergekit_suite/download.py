"""MergeKit's source distribution, which holds its tests: fetched into .cache/ by `make suite`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = f"mergekit-{version('mergekit')}"
CACHE = Path(__file__).parents[2] / ".cache"


def sdist() -> Path:
    """Of the installed version: `$MERGEKIT_SDIST`, or in .cache/ of this repository."""
    return Path(os.environ.get("MERGEKIT_SDIST") or CACHE / f"{ROOT}.tar.gz")


def main() -> None:
    """Download it, unless it is there."""
    if sdist().exists():
        return
    CACHE.mkdir(exist_ok=True)
    options = ["--quiet", "--no-deps", "--no-binary", "mergekit", "--dest", str(CACHE)]
    requirement = ROOT.replace("mergekit-", "mergekit==")
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)


if __name__ == "__main__":
    main()
