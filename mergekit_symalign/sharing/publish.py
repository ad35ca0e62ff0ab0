"""Files on their way to the Hub: one commit that has a file, its shards and the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_symalign import __version__
from mergekit_symalign.errors import HubError
from mergekit_symalign.hub.refusals import LOGIN, asking_the_hub

CARD = "README.md"


@dataclass(frozen=True)
class Target:
    """Where files go.

    Attributes:
        repo: ``user/repo``.
        revision: a branch that exists; None is the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"repository {self.repo}"


@dataclass(frozen=True)
class Standing:
    """A repository as it stands.

    Attributes:
        commit: the newest of its branch.
        readme: the text of its card; None if it has none.
    """

    commit: str | None
    readme: str | None


def require_login(repo: str) -> None:
    """
    Raises:
        HubError: if there is no token to write with.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"repository {repo}", "nobody is logged in to write to it", f"Log in: {LOGIN}")


def exists(repo: str) -> bool:
    """Whether the Hub has such a repository of models, and shows it to this user.

    Raises:
        HubError, HubFailureError: if it cannot be asked.
    """
    with asking_the_hub(f"repository {repo}", repo):
        return bool(_api().repo_exists(repo))


def made(target: Target, *, private: bool) -> Standing:
    """The repository, which is created if it is absent.

    Raises:
        HubError: if this user may not write there; if it is to be private and is public.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    api = _api()
    with asking_the_hub(str(target), target.repo, target.revision):
        api.create_repo(target.repo, private=private or None, exist_ok=True)
        found = api.repo_info(target.repo, revision=target.revision)
        if private and not found.private:
            raise HubError(str(target), "it is public, and --private is given", "Use another repository")
        try:
            readme = Path(hf_hub_download(target.repo, CARD, revision=found.sha)).read_bytes().decode()
        except EntryNotFoundError:
            readme = None
    return Standing(found.sha, readme)


def committed(target: Target, standing: Standing, files: Mapping[str, Path | bytes], message: str) -> str:
    """Upload files in one commit, on top of what was there.

    Args:
        target: where they go.
        standing: of the repository when the card was written.
        files: by path in the repository: the file or its bytes.
        message: of the commit.

    Returns:
        The commit.

    Raises:
        HubError, HubFailureError: if that fails, or somebody else was faster.
    """
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with asking_the_hub(str(target), target.repo, target.revision):
        done = _api().create_commit(
            target.repo,
            operations,
            commit_message=message,
            revision=target.revision,
            parent_commit=standing.commit,
        )
    return str(done.oid)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="mergekit-symalign", library_version=__version__)
