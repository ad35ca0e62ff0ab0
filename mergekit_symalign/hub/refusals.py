"""What huggingface_hub raises, as one error that names the file, the reason and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mergekit_symalign.errors import HubError, HubFailureError, SymalignError
from mergekit_symalign.sealed.text import shown

LOGIN = "hf auth login, or set HF_TOKEN"
_UNAUTHORIZED, _FORBIDDEN, _CONFLICT = 401, 403, (409, 412)
_CLOSED = "the client has been closed"  # how huggingface_hub 1.5 tries again after it had no connection
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def asking_the_hub(where: str, repo: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
    """Whatever goes wrong between this machine and the Hub, in one line.

    Args:
        where: what is asked for, at the beginning of the error.
        repo: of the file.
        revision: as the user named it; None is the main branch.
        file: in the repository.

    Raises:
        HubError: if the user can correct it.
        HubFailureError: if another call would not help.
    """
    try:
        yield
    except SymalignError:
        raise
    except (HTTPError, OSError, EntryNotFoundError, ValueError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        raise _Refusal(where, repo, revision or constants.DEFAULT_REVISION, file).of(cause) from error


def _cause(error: Exception) -> BaseException | None:
    """What is behind an error; None for one that nobody expected."""
    if not isinstance(error, RuntimeError):
        return error
    if _CLOSED in str(error):
        return HTTPError("no connection")
    return error.__cause__  # of a thread that uploads


class _Refusal:
    """Makes errors of what was asked for. Takes what `asking_the_hub` takes."""

    def __init__(self, where: str, repo: str, revision: str, file: str | None) -> None:
        self._where, self._repo, self._revision, self._file = where, repo, revision, file
        self._page = f"{constants.ENDPOINT}/{repo}"
        self._uncached = "" if file is None else "it is not in the cache, and "

    def of(self, error: BaseException) -> HubError:
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            return self.of(error.__cause__)  # it was not in the cache either
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return self._offline()
        if isinstance(error, (HfHubHTTPError, EntryNotFoundError)):
            return self._of_answer(error)
        if isinstance(error, HTTPError):
            return self._unreachable(error)
        if isinstance(error, FileMetadataError):
            return self._failure(
                f"{constants.ENDPOINT} does not answer as the Hub does", "Correct HF_ENDPOINT, or the proxy's settings"
            )
        if isinstance(error, OSError) and error.errno is not None:
            return self._of_disk(error)
        return self._failure(f"the transfer failed ({_line(error)})", "Try again")

    def _of_answer(self, error: BaseException) -> HubError:
        """Of what the Hub says."""
        if isinstance(error, GatedRepoError):
            remedy = f"Ask for access at {self._page}, then log in: {LOGIN}"
            return self._error(f"access to repository {self._repo} has to be granted by its owner", remedy)
        if isinstance(error, DisabledRepoError):
            return self._error(f"the Hub has disabled repository {self._repo}", "Use another file")
        if isinstance(error, RepositoryNotFoundError):
            return self._error(
                f"the Hub has no repository {self._repo}, or it is private and not yours",
                f"Correct the name; to see a private one log in: {LOGIN}",
            )
        if isinstance(error, RevisionNotFoundError):
            reason = f"repository {self._repo} has no revision {shown(self._revision)}"
            return self._error(reason, "Name a branch, tag or commit that it has")
        if isinstance(error, EntryNotFoundError):
            reason = f"repository {self._repo} has no file {self._file} in revision {shown(self._revision)}"
            return self._error(reason, f"Look for its name at {self._page}/tree/{self._revision}")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == _UNAUTHORIZED:
            return self._error("the Hub does not know you, or refuses your token", f"Log in: {LOGIN}")
        if status == _FORBIDDEN:
            reason = f"your account or token may not do this with repository {self._repo}"
            return self._error(reason, f"Use a token with this right: {LOGIN}")
        if status in _CONFLICT:
            return self._failure(f"repository {self._repo} was changed in the meantime", "Try again")
        return self._failure(f"the Hub answers with an error ({_line(error)})", "Try again later")

    def _of_disk(self, error: OSError) -> HubError:
        reason = f"it cannot be stored in the Hub's cache ({error.strerror or error})"
        remedy = "Make room there, or set HF_HOME to a folder with more"
        return self._error(reason, remedy) if error.errno in _DENIED else self._failure(reason, remedy)

    def _offline(self) -> HubError:
        get = "" if self._file is None else f", or get it while online: hf download {self._repo} {self._file}"
        reason = f"{self._uncached}the Hub is not asked offline (HF_HUB_OFFLINE)"
        return self._error(reason, f"Unset HF_HUB_OFFLINE{get}")

    def _unreachable(self, error: BaseException) -> HubError:
        reason = f"{self._uncached}{constants.ENDPOINT} cannot be reached ({_line(error)})"
        return self._failure(reason, "Check the connection, HF_ENDPOINT and the proxy's settings")

    def _error(self, reason: str, remedy: str) -> HubError:
        return HubError(self._where, reason, remedy)

    def _failure(self, reason: str, remedy: str) -> HubFailureError:
        return HubFailureError(self._where, reason, remedy)


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0].rstrip(".:"), 160)
