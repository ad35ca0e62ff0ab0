"""MergeKit's own tests pass in an interpreter that has this plugin installed, and they run our methods too.

The tests come from MergeKit's source distribution: `$MERGEKIT_SDIST`, or `.cache/` of this repository, which
`make suite` fills.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "mergekit_suite"))
from download import ROOT as SDIST_ROOT  # noqa: E402
from download import sdist  # noqa: E402

# MergeKit 0.1.5 passes 518 tests without an accelerator; far fewer means that they were not collected.
FEWEST_PASSED = 500
# Marks that JUnit puts inside a test case.
NOT_PASSED = frozenset({"failure", "error", "skipped"})
# MergeKit's test over every registered method.
STRIDED_TEST = "test_state_dict_methods_accept_strided_weights_without_mutation"


@dataclass(frozen=True)
class SuiteRun:
    """One finished run of the suite: its exit code, what it printed, and its JUnit report."""

    exit_code: int
    output: str
    report: Path

    @property
    def tail(self) -> str:
        """The end of the output, where pytest tells what failed."""
        return "\n".join(self.output.splitlines()[-80:])

    @cached_property
    def passed(self) -> list[str]:
        """Names of the tests that passed, with their parameters."""
        cases = ElementTree.parse(self.report).iter("testcase")
        return [case.attrib["name"] for case in cases if NOT_PASSED.isdisjoint(child.tag for child in case)]


def find_sdist() -> Path:
    """Return the installed MergeKit's source distribution; fail with what to run if it is not there."""
    found = sdist()
    if not found.exists():
        pytest.fail(f"{found} is missing: run `make suite`, which downloads it (or set MERGEKIT_SDIST)", pytrace=False)
    return found


def unpack_suite(sdist: Path, target: Path) -> Path:
    """Unpack MergeKit's tests and pytest settings, not its code; add the `tests/common.py` they import."""
    wanted = (f"{SDIST_ROOT}/tests/", f"{SDIST_ROOT}/pyproject.toml")
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
        archive.extractall(target, members, filter="data")
    tests = target / SDIST_ROOT / "tests"
    (tests / "__init__.py").touch()  # else a `tests` package of some other distribution would win
    shutil.copy(REPOSITORY / "tests" / "mergekit_suite" / "common.py", tests)
    return target / SDIST_ROOT


@pytest.fixture(scope="module")
def suite_run(tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    """Run the suite once, in a fresh interpreter, where only the installation can have loaded the plugin."""
    directory = unpack_suite(find_sdist(), tmp_path_factory.mktemp("mergekit"))
    report = directory / "report.xml"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"],
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return SuiteRun(finished.returncode, finished.stdout, report)


def test_mergekit_suite_passes(suite_run: SuiteRun) -> None:
    assert suite_run.exit_code == 0, suite_run.tail
    assert len(suite_run.passed) >= FEWEST_PASSED, suite_run.tail


def test_without_the_source_distribution_the_message_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is downloaded inside a test."""
    monkeypatch.setenv("MERGEKIT_SDIST", str(tmp_path / "nothing.tar.gz"))
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(pytest.fail.Exception, match="make suite"):
        find_sdist()


@pytest.mark.parametrize("method", ["aligned_task_arithmetic", "rotation_match", "regmean", "aligned_fisher"])
def test_mergekit_suite_covers_our_methods(suite_run: SuiteRun, method: str) -> None:
    """The parameters of MergeKit's test are the methods it found registered, so ours must be among them."""
    tested = f"{STRIDED_TEST}[{method}]" in suite_run.passed
    assert tested, f"no passing {STRIDED_TEST} for {method}: is the plugin installed?"
