"""What the project's own files say agrees: versions, bounds, make targets, links."""

from __future__ import annotations

import re
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.version import Version

import mergekit_symalign
from mergekit_symalign.cli import main
from mergekit_symalign.commands.versions import PACKAGES

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in TEMPLATES if path.stem != "config"]


def _text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def _yaml(name: str) -> Any:
    return yaml.safe_load(_text(name))


def _pins(name: str) -> dict[str, str]:
    lines = [line.strip() for line in _text(name).splitlines()]
    return dict(_pin(line) for line in lines if line and not line.startswith("#"))


def _pin(line: str) -> tuple[str, str]:
    name, version = line.split("==")
    return _normal(name), version


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _required() -> list[Requirement]:
    found = [Requirement(x) for x in metadata.requires("mergekit-symalign") or ()]
    return [r for r in found if r.marker is None]


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", _text("Makefile"), flags=re.M))


def test_every_dependency_has_the_lower_bound_that_is_tested() -> None:
    """constraints-oldest.txt, which `make test-oldest` installs, holds the bounds of pyproject.toml."""
    oldest, required = _pins("constraints-oldest.txt"), _required()
    assert len(required) >= 10
    for requirement in required:
        bounds = [x.version for x in requirement.specifier if x.operator == ">="]
        assert [Version(b) for b in bounds] == [Version(oldest[_normal(requirement.name)])], requirement


def test_every_module_that_the_package_imports_is_a_dependency() -> None:
    names = {"yaml": "pyyaml"}
    stdlib, own = sys.stdlib_module_names, {"mergekit_symalign", "__future__"}
    imported = set()
    for path in (ROOT / "mergekit_symalign").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)[. ]?.*$", _code(path), flags=re.M))
    optional = {"matplotlib", "gguf", "ot", "lm_eval", "ray", "numba"}  # the extras plots, demo, ot, eval, ray and fast
    optional |= {"numpy"}  # which comes with numba
    needed = {_normal(names.get(x, x)) for x in imported - stdlib - own - optional}
    assert needed <= {_normal(r.name) for r in _required()}


def _code(path: Path) -> str:
    """Without docstrings, whose lines may begin with such words."""
    return re.sub(r'""".*?"""', "", path.read_text("utf-8"), flags=re.S)


def test_the_pinned_versions_satisfy_the_bounds() -> None:
    pins = _pins("constraints.txt")
    for requirement in _required():
        assert requirement.specifier.contains(pins[_normal(requirement.name)]), requirement
    assert _pins("constraints-newest.txt") == {"torch": pins["torch"]}


def test_the_workflow_calls_make_targets_that_exist() -> None:
    workflow = _yaml(".github/workflows/ci.yml")
    jobs = workflow["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    lines = [job["strategy"]["matrix"] for job in jobs.values()]
    in_matrix = {entry["target"] for matrix in lines for entry in matrix.get("include", ())}
    called = {word for run in runs for word in re.findall(r"make ([a-z0-9-]+)", run)} | in_matrix
    assert called - _targets() == set()
    assert {"test", "test-oldest", "test-newest"} <= called
    systems = {job["runs-on"] for job in jobs.values()} | {x for matrix in lines for x in matrix.get("os", ())}
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} <= systems


def test_documented_make_targets_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", ".pre-commit-config.yaml"):
        named = re.findall(r"(?:^ {4}|`|entry: )make ([a-z0-9-]+)", _text(name), flags=re.M)
        assert named, name
        assert set(named) <= _targets(), name
    phony = {word for line in re.findall(r"^\.PHONY: (.*)$", _text("Makefile"), flags=re.M) for word in line.split()}
    assert phony == _targets()


def test_the_hooks_before_a_commit_have_the_pinned_versions() -> None:
    pins = _pins("constraints.txt")
    hooks = [hook for repo in _yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "mypy"}
    for pin in (x for hook in hooks for x in hook.get("additional_dependencies", ())):
        name, version = _pin(pin)
        assert pins[name] == version


def test_the_citation_is_of_this_version() -> None:
    citation = _yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "mergekit-symalign"
    assert citation["version"] == mergekit_symalign.__version__ == metadata.version("mergekit-symalign")
    assert {"message", "authors", "license"} <= citation.keys()
    urls = dict(x.split(", ", 1) for x in metadata.metadata("mergekit-symalign").get_all("Project-URL") or ())
    for url in [reference["url"] for reference in citation["references"]] + [urls["MergeKit"]]:
        assert url in urls.values()
        assert url in _text("README.md")


def test_the_metadata_is_what_an_index_shows() -> None:
    found = metadata.metadata("mergekit-symalign")
    assert found["Author"]
    assert found["License-Expression"] == "Apache-2.0"
    classifiers = found.get_all("Classifier") or []
    for system in ("MacOS", "Microsoft :: Windows", "POSIX :: Linux"):
        assert f"Operating System :: {system}" in classifiers
    assert "Typing :: Typed" in classifiers


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_issue_forms_ask_for_what_is_needed(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    asked = " ".join(str(field["attributes"]) for field in form["body"])
    for wanted in ("onfig", "mergekit_config.yml", "mergekit-symalign --version", "full error"):
        assert wanted in asked, (path, wanted)
    identifiers = [field["id"] for field in form["body"]]
    assert len(identifiers) == len(set(identifiers)) >= 4


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [ROOT / x for x in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_versions_to_paste_into_an_issue() -> None:
    done = CliRunner().invoke(main, ["--version"])
    assert done.exit_code == 0
    shown = dict(line.split(maxsplit=1) for line in done.output.splitlines())
    assert shown["mergekit-symalign"] == mergekit_symalign.__version__
    for name in PACKAGES:
        assert shown[name].startswith(metadata.version(name))
    assert "CPU" in shown["torch"] or "CUDA" in shown["torch"] or "ROCm" in shown["torch"]
    assert {_normal(r.name) for r in _required()} - {_normal(x) for x in PACKAGES} <= {"pyyaml", "tqdm"}
    assert sys.version.split()[0] in shown["Python"]
    assert "platform" in shown


def test_a_package_that_is_missing_ends_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    done = CliRunner().invoke(main, ["--version"])
    assert done.exit_code == 0
    assert done.output.count("not installed") == len(PACKAGES)


def test_the_source_distribution_holds_what_the_tests_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hatchling.build

    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / hatchling.build.build_sdist(str(tmp_path))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["Makefile", "pyproject.toml", "constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"]
    wanted += ["LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"]
    wanted += [".github/workflows/ci.yml", ".pre-commit-config.yaml", "mergekit_symalign/py.typed"]
    folders = ("docs", "examples", "tests", "mergekit_symalign")
    kinds = (".py", ".md", ".yml", ".yaml", ".json", ".png", ".pth", ".start")
    wanted += [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    ]
    assert set(wanted) - inside == set()
    assert not any(name.startswith((".venv", ".cache", "dist")) for name in inside)
