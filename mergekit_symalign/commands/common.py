"""What the commands share: opening models, and progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_symalign.commands.outcome import bars
from mergekit_symalign.errors import GeometryError, ModelError
from mergekit_symalign.families.resolve import resolve

Item = TypeVar("Item")


@contextmanager
def opening(name: str) -> Iterator[None]:
    """What transformers, huggingface_hub and MergeKit's loader raise for a model that is not there, as our error.

    Raises:
        ModelError: in place of theirs.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"model {name}",
            f"it cannot be opened ({reason})",
            "Name a directory with config.json and weights, or a model of the Hugging Face hub",
        ) from error


def progress(items: Iterable[Item], what: str, *, quiet: bool, total: int | None = None) -> Iterable[Item]:
    """The same items, with a bar."""
    shown: Iterable[Item] = tqdm(items, desc=what, total=total, disable=not bars(quiet), leave=False, ncols=79)
    return shown


def require_one_family(names: Sequence[str], options: MergeOptions) -> None:
    """What MergeKit would say with a traceback: every model is there, and they are of one family.

    Raises:
        ModelError: if a model cannot be found.
        ArchitectureError, GeometryError: if no family describes it, or they are of two.
    """
    families = {}
    for name in names:
        with opening(name):
            config = ModelReference.parse(name).config(trust_remote_code=options.trust_remote_code)
        families[name] = resolve(config, model=name).family.name
    anchor, model = names[0], names[-1]
    if families[anchor] != families[model]:
        raise GeometryError(
            f"model {model}",
            f"it is of family {families[model]}, the anchor {anchor} of {families[anchor]}",
            "Compare models of one architecture",
        )
