"""In ``tests``, ``python -m fuzz --count 4000 --seed 0``: every sweep of this package, and its figures."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import fuzz


def main() -> int:
    """Run the sweeps. Returns 1 if a file ended in anything but a refusal or in what does no harm."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=4000, help="files of each sweep")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = False
    for module in pkgutil.iter_modules(fuzz.__path__):
        sweep = getattr(importlib.import_module(f"fuzz.{module.name}"), "sweep", None)
        if sweep is not None:
            found = sweep(options.count, options.seed)
            failed |= found.get("other", 0) > 0
            print(f"{module.name}: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
