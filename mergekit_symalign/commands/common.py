"""What the commands share: opening models, and progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_symalign.commands.alignment import alignment_config
from mergekit_symalign.commands.outcome import bars
from mergekit_symalign.errors import GeometryError
from mergekit_symalign.graph.opening import opening, require_config, require_openable
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.graph.text_parts import text_parts

Item = TypeVar("Item")


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
        families[name] = resolve_stored(config, reference).family.name
    anchor, model = names[0], names[-1]
    if families[anchor] != families[model]:
        raise GeometryError(
            f"model {model}",
            f"it is of family {families[model]}, but the anchor {anchor} is of family {families[anchor]}",
            "Compare models of one architecture",
        )
    require_openable(models.values(), options)


def require_alignable(anchor: str, model: str, options: MergeOptions) -> None:
    """The same, and a text model may be aligned to the text model inside the anchor.

    Raises:
        ModelError, CheckpointError, ConfigError, ArchitectureError, GeometryError: as `require_one_family`.
    """
    for name in (anchor, model):
        require_config(parsed(name), trust_remote_code=options.trust_remote_code)
    if text_parts(alignment_config(anchor, model, {}), options.trust_remote_code).outer is None:
        require_one_family((anchor, model), options)
    else:
        require_openable(map(parsed, (anchor, model)), options)


def parsed(name: str) -> ModelReference:
    """A model as merges name it: ``model``, ``model@revision``, ``model+adapter``.

    Raises:
        ModelError: if the name has another form.
    """
    with opening(name):
        return ModelReference.parse(name)
