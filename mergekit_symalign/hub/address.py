"""What a file on the Hub is called: ``hf://user/repo/file.safetensors@revision``, and which cached file is which."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from mergekit_symalign.errors import HubError
from mergekit_symalign.sealed.text import shown

SCHEME = "hf://"
SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index.json"
FORM = "Write hf://user/repo/file.safetensors, and @revision behind it if you need one"
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f\\<>:\"'`|?*#%{}\[\]]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--(.+?)--([^/\\]+)[/\\]snapshots[/\\]")
_FOLDER = re.compile(r"models--(.+?)--(.+)")  # of a repository in huggingface_hub's cache


@dataclass(frozen=True)
class Address:
    """A file in a repository of models.

    Attributes:
        repo: ``user/repo``.
        file: its path in the repository.
        revision: branch, tag or commit; None is the main branch.
    """

    repo: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}/{self.file}" + ("" if self.revision is None else f"@{self.revision}")

    @property
    def pinned(self) -> bool:
        """Whether it names a commit, so that it is the same file for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        """Where a browser shows the file."""
        from huggingface_hub import constants

        at = quote(self.revision or constants.DEFAULT_REVISION, safe="")
        return f"{constants.ENDPOINT}/{self.repo}/blob/{at}/{quote(self.file)}"

    def at(self, revision: str) -> Address:
        return replace(self, revision=revision)

    def beside(self, name: str) -> Address:
        """Another file of the same folder and revision."""
        return replace(self, file=str(PurePosixPath(self.file).with_name(name)))


def is_address(text: object) -> bool:
    """Whether a path is meant to be on the Hub, well formed or not."""
    return isinstance(text, str) and text.startswith(SCHEME)


def parsed(text: str) -> Address:
    """
    Raises:
        HubError: if it is no address of an alignment or a file of statistics.
    """
    path, at, revision = text.removeprefix(SCHEME).partition("@")
    user, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if at and "/" in revision and not file:
        raise _malformed(text, "the revision stands before the file")
    if user in _OTHER_KINDS:
        raise _malformed(text, f"{user} are not repositories of models")
    problem = problem_of_repo(f"{user}/{name}") or problem_of_file(file)
    if problem is None and at and problem_of_revision(revision):
        problem = f"it has no revision that can be: {shown(revision)}"
    if problem is not None:
        raise _malformed(text, problem)
    return Address(f"{user}/{name}", file, revision if at else None)


def problem_of_repo(repo: str) -> str | None:
    """Why this cannot be a repository; None if it can."""
    parts = repo.split("/")
    wrong = len(parts) != 2 or not all(map(_PART.fullmatch, parts)) or "--" in repo or ".." in repo
    return f"it names no repository user/repo, but {shown(repo)}" if wrong or repo.endswith(".git") else None


def problem_of_file(file: str) -> str | None:
    """Why this cannot be the name of an alignment or a file of statistics in a repository; None if it can."""
    if not file.endswith((SUFFIX, INDEX)):
        return f"it names no file that ends in {SUFFIX}"
    if "@" in file or _FORBIDDEN.search(file) or any(part in ("", ".", "..") for part in file.split("/")):
        return f"no file can have the name {shown(file)}"
    return None


def problem_of_revision(revision: str) -> bool:
    """Whether no branch, tag or commit can have this name."""
    return not revision or ".." in revision or revision.startswith("/") or _FORBIDDEN.search(revision) is not None


def address_of(path: Path) -> Address | None:
    """What a file of huggingface_hub's cache is called on the Hub; None for all other files."""
    parts = path.parts
    for i, part in enumerate(parts):
        folder = _FOLDER.fullmatch(part)
        if folder and parts[i + 1 : i + 2] == ("snapshots",) and len(parts) > i + 3 and _COMMIT.fullmatch(parts[i + 2]):
            return Address(f"{folder[1]}/{folder[2]}", "/".join(parts[i + 3 :]), parts[i + 2])
    return None


def repo_in_cache(path: str) -> str | None:
    """The repository of which a path, of this system or another one, is a snapshot in huggingface_hub's cache."""
    found = _CACHED.search(path)
    return None if found is None else f"{found[1]}/{found[2]}"


def called(path: Path) -> str:
    """How to call a file before its user: by its address, not by its place in the cache."""
    address = address_of(path)
    return str(path if address is None else address)


def published(path: Path) -> str:
    """How to call a file before everybody: by its address, or without the folders of this machine."""
    address = address_of(path)
    return path.name if address is None else str(address)


def written_again(path: Path) -> str:
    """A path for the file that is to replace this one: nobody writes into the cache."""
    return str(path) if address_of(path) is None else path.name


def _malformed(text: str, problem: str) -> HubError:
    return HubError(shown(text, 200), f"it is not the address of a file on the Hub: {problem}", FORM)
