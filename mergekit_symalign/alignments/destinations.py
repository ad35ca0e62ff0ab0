"""Where alignments are written: under names that no two models share, and never over what is no alignment."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mergekit_symalign.alignments.numbers import ENTRY
from mergekit_symalign.errors import ConfigError
from mergekit_symalign.sealed.text import shown
from mergekit_symalign.whole_file import require_no_address

_SUFFIX = ".safetensors"
_MOST = 200  # bytes of a name; file systems take 255
_FORBIDDEN = re.compile(r'[<>:"|?*+\x00-\x1f\x7f-\x9f]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def file_names(models: Sequence[tuple[Path, str]], output: Path | None = None) -> list[Path]:
    """A file for each model, in its folder, all different also where letters of both cases are the same.

    The first model with a name gets that name; the others get it with the first number that nobody has.

    Args:
        models: folder and name of each.
        output: of the merge, which has weights of its own: ``model.safetensors``.
    """
    plain = [stem_of(model) for _, model in models]
    taken: dict[tuple[str, str], int] = {} if output is None else {_key(output.resolve(), "model"): -1}
    for i, (folder, _) in enumerate(models):
        taken.setdefault(_key(folder, plain[i]), i)
    paths = []
    for i, (folder, _) in enumerate(models):
        stem = next(stem for stem in _numbered(plain[i]) if taken.setdefault(_key(folder, stem), i) == i)
        paths.append(folder / f"{stem}{_SUFFIX}")
    return paths


def resolved_folder(folder: str, what: str) -> Path:
    """The same path for every spelling of a folder.

    Raises:
        ConfigError: if no folder can have that name.
    """
    require_no_address(Path(folder), what)
    try:
        return Path(folder).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null character, a loop of links
        raise ConfigError(
            f"{what} {shown(folder)}", f"it cannot be written ({error})", "Name another folder"
        ) from error


def stem_of(model: str) -> str:
    """The last part of a model's name, as a file can be called on every system."""
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    name = _FORBIDDEN.sub("-", unicodedata.normalize("NFC", last))
    name = name.encode()[:_MOST].decode(errors="ignore").rstrip(". ")
    return f"model-{name}" if name.startswith(".") or _DEVICES.fullmatch(name) else name or "model"


def require_alignment_or_nothing(path: Path, what: str = "output") -> None:
    """
    Raises:
        ConfigError: if there is a file that is no alignment (a model's weights may have the same name).
    """
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            replaceable = ENTRY in (file.metadata() or {})
    except (OSError, SafetensorError):
        replaceable = False
    if not replaceable:
        raise ConfigError(
            f"{what} {path}", "a file is there that is not an alignment", "Name another file, or remove it"
        )


def _numbered(stem: str) -> Iterator[str]:
    return chain((stem,), (f"{stem}-{n}" for n in count(2)))


def _key(folder: Path, stem: str) -> tuple[str, str]:
    """The same for names that some file system takes for one."""
    return str(folder).casefold(), unicodedata.normalize("NFC", stem.casefold())
