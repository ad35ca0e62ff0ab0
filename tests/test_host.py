"""A MergeKit whose names are others: stock merges run as ever, and asking for ours says what is missing."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mergekit
import pytest
import yaml
from conftest import OFFLINE, load, merge_config, merged
from models import make_model, save
from renamed_hosts import HOOK, Outcome
from write_host_names import PACKAGE, derived, sources, written

from mergekit_symalign import host

NAMES = {
    "module": "mergekit.architecture.conversion",
    "class": "mergekit.merge_methods.base.BatchOptions",
    "class from another module": "mergekit.tokenizer.PermutedVocabulary",
    "choice": "mergekit.merge_methods.base.BasePolicy.REQUIRED",
    "function": "mergekit.merge.run_merge",
    "function that gives the methods": "mergekit.merge_methods.get",
    "attribute": "mergekit.plan.MergePlanner._method",
    "field": "mergekit.io.tasks.GatherTensors.weight_info",
    "method": "mergekit.plan.MergePlanner._plan",
    "parameter": "mergekit.plan.MergePlanner.plan_tensor(cfg_reader)",
    "hook that fails half way": f"{HOOK}mergekit.plan",
}
"""One name of each kind; tests/try_host_names.py tries all."""


# The table


def test_the_table_is_what_our_sources_use() -> None:
    table = (PACKAGE / host.TABLE).read_text("utf-8")
    assert table == written(derived(sources())), "our sources use other names of MergeKit's: run make host-names"


NEW = [
    ("from mergekit.sparsify import sparsify", "mergekit.sparsify", "sparsify"),
    ("def late():\n    from mergekit.moe import MoEMergeConfig", "mergekit.moe", "MoEMergeConfig"),
    ("def f(loader): return loader.flush_all()", "mergekit.io.tasks", "LoaderCache.flush_all"),
    ("def f(options): return getattr(options, 'gpu_rich')", "mergekit.options", "MergeOptions.gpu_rich"),
    ("def f(plan): return plan.normalize_config()", "mergekit.plan", "MergePlanner.normalize_config"),
    ("x = dict(residual_weight=1)", "mergekit.config", "OutputSliceDefinition.residual_weight"),
    ("import mergekit.card\nmergekit.card.generate_card()", "mergekit.card", "generate_card"),
]
"""What our sources might use one day: code, and where it belongs in the table."""


def test_whatever_is_used_next_is_in_the_table() -> None:
    table = derived([*sources(), *(ast.parse(code) for code, _, _ in NEW)])
    for _, module, name in NEW:
        assert name not in host.needed().get(module, {})
        assert name in table[module]


def test_the_installed_mergekit_has_every_name() -> None:
    assert host.problem() is None


def test_every_name_is_missed() -> None:
    for module, names in host.needed().items():
        assert host.missing(module, names, None) == [module]
        source = host.source_of(module)
        assert source is not None
        for name, parameters in names.items():
            for last in (name.rpartition(".")[2], *parameters):
                other = re.sub(rf"\b{last}\b", f"another_{last}", source)
                lacking = host.missing(module, {name: parameters}, other)
                assert any(one.startswith(f"{module}.{name}") for one in lacking), (module, name, last)


def test_reading_a_module_imports_nothing() -> None:
    code = "import sys; from mergekit_symalign import host; assert host.problem() is None; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=OFFLINE)
    loaded = done.stdout.split()
    assert "mergekit_symalign.host" in loaded, done.stderr
    assert not [name for name in loaded if name.partition(".")[0] in ("mergekit", "torch")]


# Merges


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save(make_model("llama", i, num_hidden_layers=1), folder / str(i)) for i in range(2)]


def _configs(paths: list[Path]) -> dict[str, dict[str, Any]]:
    plain = merge_config("linear", None, paths, parameters={"weight": 0.5})
    return {"stock": plain, "ours": merge_config("rotation_match", paths[0], paths)}


@pytest.fixture(scope="module")
def outcomes(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Outcome]]:
    """For each name what a stock merge, one of ours and one of our commands did."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in _configs(paths).items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(config), "utf-8")
    asked = {
        "names": [*NAMES.values(), f"{HOOK}nothing"],
        "mergekit": str(Path(mergekit.__file__).parent),
        "configs": {name: str(folder / f"{name}.yml") for name in ("stock", "ours")},
    }
    if not hasattr(os, "fork"):
        pytest.skip("each MergeKit is tried in a process that was forked, which Windows cannot do")
    program = Path(__file__).with_name("renamed_hosts.py")
    done = subprocess.run(
        [sys.executable, program], input=json.dumps(asked), capture_output=True, text=True, env=OFFLINE, cwd=folder
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def unchanged(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The SHA-256 of the stock merge with MergeKit as it is."""
    import hashlib

    out = tmp_path_factory.mktemp("plain")
    assert load(out) == {}
    merged(_configs(paths)["stock"], out)
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors")))).hexdigest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each MergeKit is imported in a fork")
@pytest.mark.parametrize("kind", sorted(NAMES))
def test_stock_merges_run_and_ours_say_what_is_missing(
    kind: str, outcomes: dict[str, dict[str, Outcome]], unchanged: str
) -> None:
    name, found = NAMES[kind], outcomes[NAMES[kind]]
    assert found["stock"]["code"] == 0, found["stock"]["says"]
    assert found["stock"]["bytes"] == unchanged
    ours = found["ours"]
    assert (ours["code"], ours["there"], ours["traceback"]) == (1, False, False), ours["says"]
    assert ours["says"].startswith("Error: merge method rotation_match: mergekit-symalign")
    assert ours["says"].count("\n") == 1
    assert ("half done" if name.startswith(HOOK) else name) in ours["says"]
    if not name.startswith(HOOK):
        assert found["command"]["code"] == 1
        assert found["command"]["says"].startswith("Error: mergekit-symalign inspect: mergekit-symalign")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each MergeKit is imported in a fork")
def test_without_a_change_both_merges_run(outcomes: dict[str, dict[str, Outcome]], unchanged: str) -> None:
    """What the tests above do to a copy is what makes the difference."""
    found = outcomes[f"{HOOK}nothing"]
    assert found["stock"]["bytes"] == unchanged
    assert found["ours"]["code"] == 0, found["ours"]["says"]
