"""Heads and poolers that MergeKit's architecture files leave out are planned beside the tensors that the files list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit.architecture import ModelArchitecture, ModuleArchitecture, WeightInfo

from mergekit_symalign.graph.architectures import Extended
from mergekit_symalign.graph.checkpoint_checks import Checkpoint


class WithHead(Extended):
    """One with further tensors after the last layer."""

    def __init__(self, listed: ModuleArchitecture, head: Sequence[WeightInfo]) -> None:
        super().__init__(listed)
        self._head = tuple(head)

    def post_weights(self, config: Any) -> list[WeightInfo]:
        return [*super().post_weights(config), *self._head]


def with_heads(arch: ModelArchitecture, checkpoints: Sequence[Checkpoint]) -> ModelArchitecture:
    """An architecture that lists all that is outside the layers of these models, as far as all of them store it.

    Args:
        arch: MergeKit's.
        checkpoints: of all models of the merge.
    """
    if len(arch.modules) != 1:
        return arch
    found = [set(_unlisted(arch, one)) for one in checkpoints]
    names = sorted(set.intersection(*found)) if found else []
    if not names:
        return arch
    ((key, module),) = arch.modules.items()
    head = [_planned(name, checkpoints[0]) for name in names]
    completed = module.model_copy(update={"architecture": WithHead(module.architecture, head)})
    return arch.model_copy(update={"modules": {key: completed}})


def _unlisted(arch: ModelArchitecture, checkpoint: Checkpoint) -> list[str]:
    """The tensors outside the layers that a model stores and MergeKit does not list, as the model calls them."""
    listed = [
        name
        for info in arch.all_weights(checkpoint.config)
        for name in (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    ]
    if checkpoint.headers.keys() <= set(listed):
        return []
    layout = checkpoint.layout
    known = {layout.canonical(name) for name in listed}
    possible = (name for name in layout.outside if name not in known)
    return [name for name in possible if checkpoint.stored(WeightInfo(name=name, optional=True)) is not None]


def _planned(name: str, checkpoint: Checkpoint) -> WeightInfo:
    words = checkpoint.layout.outside[name].axes[:1] == ("vocabulary",)
    return WeightInfo(name=name, optional=True, vocabulary_axis=0 if words else None)
