"""What the commands share: exit codes and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import click
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors import SafetensorError
from tqdm import tqdm

from mergekit_symalign.errors import CheckpointError, GeometryError, SymalignError, ValueInTensorError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph.opening import opening, require_config, require_openable

Item = TypeVar("Item")


class BadInput(click.ClickException):
    """A command cannot start with what it was given."""

    exit_code = 2


@contextmanager
def readable() -> Iterator[None]:
    """Errors in one line: exit code 1 for damaged checkpoints and full disks, 2 for what the user can correct."""
    try:
        yield
    except (CheckpointError, ValueInTensorError) as error:
        raise click.ClickException(str(error)) from error
    except SymalignError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'writing'}: {error.strerror or error}") from error
    except SafetensorError as error:  # inputs are checked before: this is a file that could not be written
        raise click.ClickException(f"writing: {error}") from error


def bars(quiet: bool) -> bool:
    """Whether to draw progress bars: on a terminal only."""
    return not quiet and sys.stderr.isatty()


def progress(items: Iterable[Item], what: str, *, quiet: bool, total: int | None = None) -> Iterable[Item]:
    """The same items, with a bar."""
    shown: Iterable[Item] = tqdm(items, desc=what, total=total, disable=not bars(quiet), leave=False, ncols=79)
    return shown


def require_one_family(names: Sequence[str], options: MergeOptions) -> None:
    """What MergeKit would say with a traceback: every model can be read, and they are of one family.

    Raises:
        ModelError: if a model cannot be found.
        CheckpointError: if its files are damaged.
        ConfigError: if an option is missing or wrong.
        ArchitectureError, GeometryError: if no family describes it, or they are of two.
    """
    models = {name: parsed(name) for name in names}
    families = {}
    for name, reference in models.items():
        config = require_config(reference, trust_remote_code=options.trust_remote_code)
        families[name] = resolve(config, model=name).family.name
    anchor, model = names[0], names[-1]
    if families[anchor] != families[model]:
        raise GeometryError(
            f"model {model}",
            f"it is of family {families[model]}, the anchor {anchor} of {families[anchor]}",
            "Compare models of one architecture",
        )
    require_openable(models.values(), options)


def parsed(name: str) -> ModelReference:
    """A model as merges name it: ``model``, ``model@revision``, ``model+adapter``.

    Raises:
        ModelError: if the name has another form.
    """
    with opening(name):
        return ModelReference.parse(name)
