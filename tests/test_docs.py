"""The pages of docs/ as a site (mkdocs.yml), and the page for Python users."""

from __future__ import annotations

import doctest
import importlib.metadata
import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import mergekit_symalign
from mergekit_symalign import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
API = DOCS / "api.md"


def _site() -> Any:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def _links() -> ModuleType:
    """The hook, as mkdocs loads it."""
    (path,) = _site()["hooks"]
    spec = importlib.util.spec_from_file_location("links", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pages(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for where in entry.values():
            yield from [where] if isinstance(where, str) else _pages(where)


def test_every_page_has_one_place_in_the_navigation() -> None:
    listed = list(_pages(_site()["nav"]))
    assert len(listed) == len(set(listed))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(listed)


def test_a_broken_link_or_anchor_ends_the_build() -> None:
    site = _site()
    assert site["strict"] is True
    assert site["validation"].keys() >= {"anchors", "absolute_links", "unrecognized_links", "omitted_files"}
    assert set(site["validation"].values()) == {"warn"}


def test_the_packages_of_the_site_are_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    wanted = [Requirement(x) for x in importlib.metadata.requires("mergekit-symalign") or ()]
    docs = [r for r in wanted if r.marker is not None and r.marker.evaluate({"extra": "docs"})]
    assert {r.name for r in docs} == {"mkdocs", "mkdocstrings"}
    assert {r.name for r in docs} <= pinned


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        ("[examples/](../examples)", "`examples`"),
        ("[`Makefile`](../Makefile)", "`Makefile`"),
        ("see [how to report](../CONTRIBUTING.md#reporting).", "see how to report (`CONTRIBUTING.md`)."),
        ("[commands](commands.md#solve)", "[commands](commands.md#solve)"),
        ("![picture](figures/drift.png)", "![picture](figures/drift.png)"),
    ],
)
def test_links_out_of_the_pages_become_text(markdown: str, shown: str, caplog: pytest.LogCaptureFixture) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="quickstart.md"))
    assert _links().on_page_markdown(markdown, page=page) == shown
    assert not caplog.records


def test_links_out_of_the_pages_that_lead_nowhere_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="quickstart.md"))
    with caplog.at_level(logging.WARNING):
        _links().on_page_markdown("[nothing](../nothing.md)", page=page)
    assert [record.name.partition(".")[0] for record in caplog.records] == ["mkdocs"]  # counted by a strict build
    assert "quickstart.md links to ../nothing.md" in caplog.text


def test_the_example_of_the_api_page_runs() -> None:
    found = doctest.testfile(str(API), module_relative=False, encoding="utf-8")
    assert found.attempted > 5
    assert found.failed == 0


def test_the_api_page_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: mergekit_symalign\.(\S+)$", API.read_text("utf-8"), flags=re.M))
    public = mergekit_symalign._PUBLIC
    assert shown == {f"{where}.{name}" for name, where in public.items() if where != "errors"} | {"errors"}
    assert set(mergekit_symalign.__all__) == {"__version__", *public}


def test_every_public_name_is_there_and_every_error_is_public() -> None:
    for name in mergekit_symalign._PUBLIC:
        assert getattr(mergekit_symalign, name).__name__ == name
        assert name in dir(mergekit_symalign)
    own = {name for name, x in vars(errors).items() if isinstance(x, type) and issubclass(x, errors.SymalignError)}
    assert own <= mergekit_symalign._PUBLIC.keys()
    with pytest.raises(AttributeError, match="solve_blocks"):
        _ = mergekit_symalign.solve_blocks


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mergekit_symalign", ("torch", "mergekit")),
        ("from mergekit_symalign import ShapeError", ("torch", "mergekit")),
        ("from mergekit_symalign import solve_block, Symmetries, HeadShape, MlpShape, Solved", ("mergekit",)),
    ],
)
def test_importing_brings_no_more_than_is_needed(code: str, absent: tuple[str, ...]) -> None:
    code = f"{code}; import sys; assert not {set(absent)!r} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["solve_block", "Solved", "HeadShape", "MlpShape", "Symmetries", "BlockElement"])
def test_public_names_have_a_docstring_for_their_attributes_or_arguments(name: str) -> None:
    assert re.search(r"^ {4,}(Args|Attributes):$", getattr(mergekit_symalign, name).__doc__, flags=re.M)
