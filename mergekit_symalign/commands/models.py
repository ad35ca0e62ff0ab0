"""The models that a command reads: their files, checked, and their tensors, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from mergekit.architecture import WeightInfo
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor, nn

from mergekit_symalign.activations.objectives import Objective, objective_of
from mergekit_symalign.activations.runner import LayerRunner, require_runs
from mergekit_symalign.commands.common import parsed
from mergekit_symalign.errors import CheckpointError, GeometryError
from mergekit_symalign.families.stream import head_name, heads_of
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.leftovers import are_equal
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.opening import require_config, require_openable
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.graph.untie import require_parting


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint that is run without ever being loaded as a whole.

    Attributes:
        checkpoint: its files.
        runner: the model without weights.
        device: where its tensors go.
    """

    checkpoint: Checkpoint
    runner: LayerRunner
    device: str

    @staticmethod
    def open(name: str, options: MergeOptions, attention: str = "eager") -> StoredModel:
        """
        Args:
            name: as a merge takes it: ``model``, ``model@revision``, ``model+adapter``.
            options: of MergeKit.
            attention: how transformers computes it, if the model knows it.

        Raises:
            ModelError: if there is no such model.
            ConfigError: if an option is missing or wrong.
            ArchitectureError, CheckpointError: if it cannot be run, or a tensor is missing, quantised or misshapen.
        """
        reference = parsed(name)
        config = require_config(reference, trust_remote_code=options.trust_remote_code)
        layout = resolve_stored(config, reference)
        require_runs(layout, name)
        require_openable([reference], options)
        checkpoint = Checkpoint.open(reference, config, layout)
        model = StoredModel(checkpoint, LayerRunner(config, layout, attention), options.device or "cpu")
        model._untie()
        model._check()
        return model

    def has_tied_head(self) -> bool:
        """Whether the head is the embedding, as stored."""
        return any(heads_of(self.checkpoint.layout) & {*names} for names in self._outside_names() if len(names) > 1)

    def untie_head(self) -> None:
        """Give the head a place of its own; `outside` then gives the embedding's numbers under both names.

        Raises:
            ArchitectureError: if the head must stay the embedding.
        """
        require_parting(self.checkpoint)
        for names in self._outside_names():
            for name in names[1:] if heads_of(self.checkpoint.layout) & {*names} else ():
                _untie(self.runner.model, name)

    @property
    def name(self) -> str:
        return str(self.checkpoint.model)

    @property
    def layers(self) -> int:
        return self.checkpoint.layout.layers

    def objective(self) -> Objective:
        """What the model predicts; around a text model that has a head, the next token of a text."""
        layout = self.checkpoint.layout
        if layout.family.config and head_name(layout) is not None:
            return Objective.next_token
        return objective_of(type(self.runner.model).__name__)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer in float32, by their name inside the layer."""
        prefix = self.checkpoint.layout.name(index, "")
        return {name.removeprefix(prefix): x for name, x in self._load(self._inside(index)).items()}

    def outside(self) -> dict[str, Tensor]:
        """All tensors outside the layers, by name."""
        return self._load(next(filter(self._stored, names)) for names in self._outside_names())

    def stored_dtype(self) -> torch.dtype:
        """The coarsest dtype among the stored weights."""
        dtypes = {header.dtype for header in self.checkpoint.headers.values() if header.dtype is not None}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def positions(self) -> int | None:
        """How many tokens a text may have, where the model has an embedding for each position; None elsewhere."""
        layout, config = self.checkpoint.layout, self.checkpoint.config
        for name, spec in layout.outside.items():
            header = self.checkpoint.stored(WeightInfo(name=name))
            if "position" in spec.axes and header is not None:
                taken = (config.pad_token_id or 0) + 1 if layout.family.positions_after_padding else 0
                return header.shape[spec.axes.index("position")] - taken
        return None

    def _inside(self, index: int) -> list[str]:
        layer = self.runner.layers[index]
        return [self.checkpoint.layout.name(index, part) for part, _ in layer.named_parameters()]

    def _load(self, names: Iterable[str]) -> dict[str, Tensor]:
        loads = (
            LoadFinite(
                model=self.checkpoint.model,
                tensor=name,
                device=self.device,
                aliases=self.checkpoint.other_names(WeightInfo(name=name)) or None,
            )
            for name in names
        )
        found = {load.tensor: load.execute() for load in loads}
        return {name: x.float() for name, x in found.items() if x is not None}

    def _stored(self, name: str) -> bool:
        return self.checkpoint.stored(WeightInfo(name=name)) is not None

    def _outside_names(self) -> list[list[str]]:
        """The names of each parameter outside the layers; several where it is tied, and the first one counts."""
        prefix = self.checkpoint.layout.name(0, "").rpartition("0.")[0]
        names: dict[int, list[str]] = {}
        for name, parameter in self.runner.model.named_parameters(remove_duplicate=False):
            if not name.startswith(prefix):
                names.setdefault(id(parameter), []).append(name)
        return list(names.values())

    def _untie(self) -> None:
        """As transformers does: what is stored twice with different numbers is not tied, whatever the config says."""
        for names in self._outside_names():
            infos = {name: WeightInfo(name=name, optional=True) for name in names}
            found = [
                (name, stored) for name in names if (stored := self.checkpoint.stored_name(infos[name])) is not None
            ]
            for name, stored in found[1:]:
                if not are_equal(self.checkpoint, found[0][1], stored):
                    _untie(self.runner.model, name)

    def _check(self) -> None:
        """Every parameter of the model is there, in a floating-point type and the right shape."""
        inside = [[name] for i in range(self.layers) for name in self._inside(i)]
        for names in (*self._outside_names(), *inside):
            if not any(map(self._stored, names)):
                raise CheckpointError(
                    f"tensor {names[0]} of model {self.name}",
                    "the checkpoint does not have it",
                    "Download or export the checkpoint again",
                )
            for name in filter(self._stored, names):
                self._check_stored(name)

    def _check_stored(self, name: str) -> None:
        header = self.checkpoint.stored(WeightInfo(name=name))
        expected = tuple(self.runner.model.get_parameter(name).shape)
        where = f"tensor {name} of model {self.name}"
        if header is None or header.dtype is None:
            raise CheckpointError(where, "it is quantised", "Use the model's unquantised checkpoint")
        if header.shape != expected:
            raise CheckpointError(
                where,
                f"its shape is {header.shape}; the model's config asks for {expected}",
                "Check that config.json belongs to these weights",
            )


def _untie(model: nn.Module, name: str) -> None:
    """Give a parameter a place of its own."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, last, nn.Parameter(torch.empty_like(getattr(module, last)), requires_grad=False))


def require_comparable(a: StoredModel, b: StoredModel) -> None:
    """
    Raises:
        GeometryError: if the two are of different architectures or sizes.
    """
    one, other = a.checkpoint.layout, b.checkpoint.layout
    differences = one.geometry.differences(other.geometry)
    if one.family.name != other.family.name:
        differences = [f"{one.family.title} and {other.family.title}"]
    elif one.layers != other.layers:
        differences.append(f"layers {one.layers} != {other.layers}")
    if differences:
        raise GeometryError(
            f"models {a.name} and {b.name}",
            f"they differ in architecture: {', '.join(differences)}",
            "Compare a model with itself in other coordinates",
        )


def use_cache_of(options: MergeOptions) -> None:
    """Let MergeKit's loaders know the options."""
    LoaderCache().setup(options)
