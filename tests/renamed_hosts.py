"""MergeKit with one name changed, as another version might have it: stock merges run, ours say what is missing.

Run as a program (by tests/test_host.py, and by tests/try_host_names.py for every name of the table): torch and
transformers are imported once, and each changed copy of MergeKit is imported in a fork of that process.

A name is one of MergeKit's, or ``hook:`` and a module whose hook is to fail.
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
HOOK = "hook:"
Outcome = dict[str, Any]


def changed(source: Path, folder: Path, name: str) -> None:
    """A copy of MergeKit in which a module, class, function, member or parameter has another name everywhere."""
    copy = shutil.copytree(source, folder / "mergekit")
    if name.startswith(HOOK):
        return
    owner, last = re.split(r"[.(](?=\w+\)?$)", name)
    last = last.rstrip(")")
    moved = _files(folder, name)
    kind = "module" if moved else "bound" if _files(folder, owner) else "member"
    places = re.compile(_places(last, owner.rpartition(".")[2], kind), re.MULTILINE)
    for file in copy.rglob("*.py"):
        before = file.read_text("utf-8")
        after = places.sub(f"{last}{CHANGED}", before)
        if after != before:
            file.write_text(after, "utf-8")
    for path in moved:
        path.rename(path.with_name(f"{last}{CHANGED}{path.suffix}"))


def _files(folder: Path, module: str) -> list[Path]:
    path = folder.joinpath(*module.split("."))
    return [one for one in (path, path.with_suffix(".py")) if one.exists()]


def _places(last: str, owner: str, kind: str) -> str:
    """Where a name is changed. Other things may have the same name, if it is a common word."""
    if kind == "module":
        return rf"(?<=\.){last}\b(?=[\w. ]* import|$)|(?<=import ){last}\b"
    if kind == "bound":
        return rf"(?<![\w.])(?<!    def ){last}\b|(?<=\b{owner}\.){last}\b"
    if not last.islower() or "_" in last:
        return rf"\b{last}\b"
    return rf"(?<=\.){last}\b|(?<=def ){last}\b|(?<=^    ){last}(?=:)|\b{last}(?==)"


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


def _both(name: str, configs: dict[str, Path], folder: Path) -> dict[str, Outcome]:
    """A stock merge and one of ours by mergekit-yaml, and one of our commands."""
    if name.startswith(HOOK):
        _break(name.removeprefix(HOOK))
    found = {method: _merged(config, folder / method) for method, config in configs.items()}
    return found | {"command": _inspected()}


def _inspected() -> Outcome:
    from click.testing import CliRunner

    from mergekit_symalign.cli import main

    done = CliRunner().invoke(main, ["inspect", "one", "another"])
    unexpected = done.exception is not None and not isinstance(done.exception, SystemExit)
    return {"code": done.exit_code, "says": repr(done.exception) if unexpected else done.output}


def _break(module: str) -> None:
    """Let the hook of a module do half its work and fail."""
    from mergekit_symalign import hook

    whole = hook._HOOKS.get(module, lambda _: None)

    def broken(imported: Any) -> None:
        whole(imported)
        raise KeyError("half done")

    hook._HOOKS[module] = broken


def _alone(configs: dict[str, Path], folder: Path) -> dict[str, Outcome]:
    """The stock merge without our package."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "SymalignFinder"]
    return {"alone": _merged(configs["stock"], folder / "alone")}


def _forked(work: Callable[[], dict[str, Outcome]], folder: Path) -> dict[str, Outcome]:
    """The outcome of some work in a process of its own, with a MergeKit of its own."""
    result = folder / "outcome.json"
    result.unlink(missing_ok=True)
    if not hasattr(os, "fork"):
        raise RuntimeError("this system cannot fork")
    if (pid := os.fork()) == 0:
        try:
            sys.path.insert(0, str(folder))
            result.write_text(json.dumps(work()), "utf-8")
        except BaseException as error:
            failed = {"code": None, "bytes": None, "there": False, "says": repr(error), "traceback": True}
            result.write_text(json.dumps(dict.fromkeys(("stock", "ours", "command", "alone"), failed)), "utf-8")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    outcome: dict[str, Outcome] = json.loads(result.read_text("utf-8"))
    return outcome


def outcomes(names: list[str], source: Path, configs: dict[str, Path]) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """For each name a stock merge and one of ours; where the stock merge fails, also one without our package."""
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            changed(source, folder, name)
            found = _forked(lambda: _both(name, configs, folder), folder)  # noqa: B023
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
