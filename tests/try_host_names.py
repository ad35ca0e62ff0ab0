"""Tries every name of ``host_names.json`` as tests/test_host.py tries some: `make host-names-tried`, about ten minutes.

Prints the names that do not behave as promised, and how many could be tried. A change that breaks MergeKit itself, with
our package switched off, says nothing of us.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mergekit
import yaml
from models import make_model, save
from renamed_hosts import Outcome

from mergekit_symalign import host


def names() -> list[str]:
    """Every module, name and parameter of the table; a constructor has no other name."""
    found = []
    for module, bound in host.needed().items():
        found.append(module)
        for name, parameters in bound.items():
            found += [f"{module}.{name}({parameter})" for parameter in sorted(parameters)]
            found += [] if name.endswith("__init__") else [f"{module}.{name}"]
    return found


def verdict(found: dict[str, Outcome]) -> str:
    stock, ours = found["stock"], found["ours"]
    if "alone" in found and found["alone"]["code"] != 0:
        return "MergeKit itself breaks"
    refused = ours["code"] == 1 and not ours["there"] and not ours["traceback"] and ours["says"].count("\n") == 1
    as_promised = stock["code"] == 0 and refused and "does not know the internals" in ours["says"]
    return "as promised" if as_promised else "NOT as promised"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = [str(save(make_model("llama", i, num_hidden_layers=1), folder / str(i))) for i in range(2)]
        listed: dict[str, Any] = {"models": [{"model": m, "parameters": {"weight": 0.5}} for m in models]}
        merges = {
            "stock": {"merge_method": "linear"},
            "ours": {"merge_method": "rotation_match", "base_model": models[0]},
        }
        configs = {name: folder / f"{name}.yml" for name in merges}
        for name, file in configs.items():
            file.write_text(yaml.safe_dump(merges[name] | listed), "utf-8")
        asked = {
            "names": names(),
            "mergekit": str(Path(mergekit.__file__).parent),
            "configs": {name: str(file) for name, file in configs.items()},
        }
        program = [sys.executable, Path(__file__).with_name("renamed_hosts.py")]
        done = subprocess.run(
            program, input=json.dumps(asked), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
    results = dict(map(json.loads, done.stdout.splitlines()))
    verdicts = {name: verdict(found) for name, found in results.items()}
    for name, said in verdicts.items():
        if said == "NOT as promised":
            print(name, results[name])
    print(dict(Counter(verdicts.values())))


if __name__ == "__main__":
    main()
