"""MergeKit with one name changed, as another version might have it: stock merges run, ours say what is missing.

Run as a program (by tests/test_host.py, and by `make host-names-tried` for every name of the table): torch and
transformers are imported once, and each changed copy of MergeKit is imported in a fork of that process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHANGED = "_as_another_version_has_it"
Outcome = dict[str, Any]


def changed(source: Path, folder: Path, name: str) -> None:
    """A copy of MergeKit in which a module, class, function, member or parameter has another name everywhere."""
    shutil.copytree(source, folder / "mergekit")
    last = re.split(r"[.(]", name.rstrip(")"))[-1]
    for file in (folder / "mergekit").rglob("*.py"):
        before = file.read_text("utf-8")
        after = re.sub(_places(last, whole=name.startswith("mergekit.")), rf"{last}{CHANGED}", before)
        if after != before:
            file.write_text(after, "utf-8")
        if name.startswith("mergekit.") and file.stem == last:
            file.rename(file.with_name(f"{last}{CHANGED}.py"))


def _places(last: str, *, whole: bool) -> str:
    """Where a name is changed: everywhere if it is of a kind of its own, else where it is an attribute or a field."""
    if whole or not last.islower() or "_" in last:
        return rf"\b{last}\b"
    return rf"(?<=\.){last}\b|(?<=def ){last}\b|^(?P<s>\s+){last}(?=:)|\b{last}(?==)"


def _merged(config: Path, out: Path) -> Outcome:
    """What ``mergekit-yaml`` does with the MergeKit that is first on the path."""
    import mergekit.merge_methods  # noqa: F401
    from click.testing import CliRunner
    from mergekit.scripts.run_yaml import main

    options = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]
    done = CliRunner().invoke(main, [str(config), str(out), *options])
    written = b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors")))
    unexpected = done.exception is not None and not isinstance(done.exception, SystemExit)
    return {
        "code": done.exit_code,
        "bytes": hashlib.sha256(written).hexdigest() if written else None,
        "there": out.exists(),
        "says": repr(done.exception) if unexpected else done.output,
        "traceback": unexpected,
    }


def _both(configs: dict[str, Path], folder: Path) -> dict[str, Outcome]:
    return {name: _merged(config, folder / name) for name, config in configs.items()}


def _alone(configs: dict[str, Path], folder: Path) -> dict[str, Outcome]:
    """The stock merge without our package."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "SymalignFinder"]
    return {"alone": _merged(configs["stock"], folder / "alone")}


def _forked(work: Callable[[], dict[str, Outcome]], folder: Path) -> dict[str, Outcome]:
    """The outcome of some work in a process of its own, with a MergeKit of its own."""
    result = folder / "outcome.json"
    result.unlink(missing_ok=True)
    if (pid := os.fork()) == 0:
        try:
            sys.path.insert(0, str(folder))
            result.write_text(json.dumps(work()))
        except BaseException as error:
            failed = {"code": None, "bytes": None, "there": False, "says": repr(error), "traceback": True}
            result.write_text(json.dumps(dict.fromkeys(("stock", "ours", "alone"), failed)))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    outcome: dict[str, Outcome] = json.loads(result.read_text())
    return outcome


def outcomes(names: list[str], source: Path, configs: dict[str, Path]) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """For each name a stock merge and one of ours; where the stock merge fails, also one without our package."""
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            changed(source, folder, name)
            found = _forked(lambda: _both(configs, folder), folder)  # noqa: B023
            if found["stock"]["code"] != 0:
                found |= _forked(lambda: _alone(configs, folder), folder)  # noqa: B023
            yield name, found


def main() -> None:
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama  # noqa: F401

    asked = json.loads(sys.stdin.read())
    configs = {name: Path(path) for name, path in asked["configs"].items()}
    for name, found in outcomes(asked["names"], Path(asked["mergekit"]), configs):
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
