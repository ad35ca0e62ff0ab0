"""Files and folders that people name for output: tried before any work, and there only when they are whole."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_symalign.errors import ConfigError

_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` when all is written, and is removed on an error.

    Raises:
        OSError: with the name of ``path``, if it cannot be replaced: Windows keeps files that a program has open.
    """
    scratch = _scratch(path.parent, path.suffix)
    try:
        yield scratch
        _replace(scratch, path)
    finally:
        with suppress(OSError):  # Windows keeps it while it is open; the error that brought us here says more
            scratch.unlink(missing_ok=True)


def require_writable(path: Path, what: str = "output", *, folder_is_made: bool = True) -> None:
    """Try whether a file can be written under a name. Nothing is left behind.

    Args:
        path: of the file.
        what: how to call it in an error.
        folder_is_made: whether the folders above it may be missing.

    Raises:
        ConfigError: naming the file and what the operating system says.
    """
    require_no_address(path, what)
    with _tried(path, what):
        if path.is_dir():
            raise ConfigError(f"{what} {path}", "it is a directory", "Name a file")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{what} {path}", "it is not a regular file", "Name another file")
        if not folder_is_made and not path.absolute().parent.exists():
            raise ConfigError(f"{what} {path}", "its directory does not exist", "Make the directory first")
        with _made(path.parent):
            if not path.exists():
                _touch(path)
            _touch(_scratch(path.parent, path.suffix))


def require_writable_folder(path: Path, what: str = "output") -> None:
    """The same of a folder that files are to be written to."""
    require_no_address(path, what)
    with _tried(path, what):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{what} {path}", "it is a file", "Name a directory")
        with _made(path):
            _touch(_scratch(path, ""))


def require_no_address(path: Path, what: str) -> None:
    """
    Raises:
        ConfigError: if the Hub is named as a place to write to.
    """
    if path.parts[:1] == ("hf:",):
        raise ConfigError(
            f"{what} {path}", "nothing is written to the Hub", "Name a file, then upload it: mergekit-symalign push"
        )


def _scratch(folder: Path, suffix: str) -> Path:
    """A short name that nothing else has; what writes pictures looks at the suffix."""
    return folder / f".{os.getpid()}-{secrets.token_hex(4)}{suffix[:16]}"


@contextmanager
def _tried(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{what} {path}", f"it cannot be written ({reason})", "Name a place where files can be written"
        ) from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it for a moment."""
    absent = []
    while not folder.exists():
        absent.append(folder)
        folder = folder.parent
    made = []
    try:
        for missing in reversed(absent):
            missing.mkdir()
            made.append(missing)
        yield
    finally:
        for missing in reversed(made):
            with suppress(OSError):  # somebody else uses it by now
                missing.rmdir()


def _touch(path: Path) -> None:
    """Make an empty file and remove it."""
    path.open("xb").close()
    path.unlink()


def _replace(scratch: Path, path: Path) -> None:
    """Virus scanners and indexers on Windows open a new file for a moment: then try again."""
    for wait in (*_WAITS, None):
        try:
            scratch.replace(path)
            return
        except OSError as error:
            if wait is None or not isinstance(error, PermissionError):
                raise OSError(error.errno, f"cannot be replaced ({error.strerror})", str(path)) from error
            time.sleep(wait)
