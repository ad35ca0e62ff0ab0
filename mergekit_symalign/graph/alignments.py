"""Alignments from files and into files, inside a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache

from mergekit_symalign import __version__
from mergekit_symalign.alignment_file import AlignmentFile, Origin, block_name, save_alignment
from mergekit_symalign.alignments.destinations import file_names, require_alignment_or_nothing, resolved_folder
from mergekit_symalign.alignments.fit import (
    STREAM_BLOCK,
    require_block,
    require_fitting_block,
    require_fitting_stream,
    require_known_blocks,
)
from mergekit_symalign.errors import AlignmentFileError, ConfigError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.towers import Layer, layer_name
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.latent_gains import require_gains
from mergekit_symalign.hub.address import published
from mergekit_symalign.sharing.fetch import ALIGNMENT, local_file
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.whole_file import require_writable

DIFFERS = "differs between layers"
SourceBlock = Tuple[Layer, BlockKind]  # layer of the model, which is also the anchor's


class ReadBlock(Task[Dict[str, Any]]):
    """The element of one block, from a file; stands where `SolveBlock` stands.

    Attributes:
        path: of the file.
        sha256: of all that it said when the merge was planned.
        block: its name in the file.
        label: when to schedule it.
        inverse: whether to undo the alignment instead.
    """

    path: str
    sha256: str
    block: str
    label: Optional[str] = None
    inverse: bool = False

    def arguments(self) -> Dict[str, Task]:
        return {}

    def group_label(self) -> Optional[str]:
        return self.label

    def file(self) -> AlignmentFile:
        """The file, its numbers unchecked."""
        return AlignmentFile.described(Path(self.path))

    def execute(self) -> Dict[str, Any]:
        file = self.file()
        if file.sha256 != self.sha256:
            raise AlignmentFileError(file.label, "it was replaced while it was in use", "Start again")
        element = file.element(self.block)
        return {
            "actions": (element.inverse() if self.inverse else element).pack(),
            "facts": dict(file.facts.get(self.block, {})),
        }


class SaveAlignment(Task[str]):
    """Writes the elements of all blocks of one model to a file, when the last of them is solved.

    Attributes:
        path: of the file.
        origin: what the alignment belongs to, as JSON.
        solutions: the task of each block.
    """

    path: str
    origin: str
    solutions: Tuple[Tuple[str, Task], ...]

    def arguments(self) -> Dict[str, Task]:
        return dict(self.solutions)

    def execute(self, **solutions: Dict[str, Any]) -> str:
        elements = {block: BlockElement.unpack(s["actions"]) for block, s in solutions.items()}
        facts = {block: s["facts"] for block, s in solutions.items()}
        save_alignment(Path(self.path), Origin(**json.loads(self.origin)), elements, facts)
        return self.path


@dataclass(frozen=True)
class _Solved:
    """A block that is to be saved: the task that gives its element, and the parameters of its solve."""

    solution: Task
    settings: Mapping[str, Any]


@dataclass
class Alignments:
    """The alignment files that a merge reads and writes.

    Attributes:
        checkpoints: the models of the merge.
        exact: whether every element that was read keeps the function of its model.
    """

    checkpoints: Mapping[ModelReference, Checkpoint]
    exact: bool = True
    _files: dict[tuple[str, ModelReference, ModelReference], AlignmentFile] = field(default_factory=dict)
    _paths: dict[str, str] = field(default_factory=dict)
    _fingerprints: dict[ModelReference, str] = field(default_factory=dict)
    _solved: dict[tuple[Path, ModelReference, ModelReference], dict[str, _Solved]] = field(default_factory=dict)

    def read(self, path: str, anchor: ModelReference, model: ModelReference, block: SourceBlock) -> tuple[str, str]:
        """Digest and block name for a `ReadBlock`, once the file was found to belong to these models.

        Raises:
            AlignmentFileError: if it does not, does not have this block, or has no symmetry of the model there.
        """
        file = self._file(path, anchor, model)
        name = require_block(file, *block)
        checkpoint = self.checkpoints[model]
        self.exact &= require_fitting_block(file, checkpoint.layout, *block, halves=has_halves(checkpoint))
        if block[1] is BlockKind.attention and isinstance(block[0], int):
            require_gains(file, checkpoint, block[0])
        return file.sha256, name

    def has_stream(self, path: str, anchor: ModelReference, model: ModelReference) -> bool:
        """Whether a file moves the residual stream. Raises what `read` does of the file as a whole."""
        return STREAM_BLOCK in self._file(path, anchor, model).blocks

    def read_stream(self, path: str, anchor: ModelReference, model: ModelReference, tied: bool) -> tuple[str, Residual]:
        """Digest and parameter ``residual`` of a file that moves the residual stream.

        Raises:
            AlignmentFileError: if its element is none of the model's.
        """
        file = self._file(path, anchor, model)
        return file.sha256, require_fitting_stream(file, self.checkpoints[anchor].layout, tied)

    def record_stream(
        self, folder: str, anchor: ModelReference, model: ModelReference, solution: Task, settings: Mapping[str, Any]
    ) -> None:
        """Remember that the element of a model's residual stream is to be saved."""
        if isinstance(solution, ReadBlock):
            settings = self._files[solution.path, anchor, model].settings_of(STREAM_BLOCK)
        blocks = self._solved.setdefault((resolved_folder(folder, "save_alignment"), anchor, model), {})
        blocks.setdefault(STREAM_BLOCK, _Solved(solution, settings))

    def record(
        self,
        folder: str,
        anchor: ModelReference,
        model: ModelReference,
        block: SourceBlock,
        solution: Task,
        settings: Mapping[str, Any],
    ) -> None:
        """Remember that the solution of a block is to be saved, with the parameters that it was solved with."""
        name = block_name(block[0], block[1].value)
        if isinstance(solution, ReadBlock):
            settings = self._files[solution.path, anchor, model].settings_of(name)
        blocks = self._solved.setdefault((resolved_folder(folder, "save_alignment"), anchor, model), {})
        blocks.setdefault(name, _Solved(solution, settings))

    def save_tasks(self, out_path: Path | None = None) -> list[Task]:
        """One file for each model that was aligned.

        Args:
            out_path: where the merge writes its own files.

        Raises:
            ConfigError: if one of them cannot be written.
        """
        names = file_names([(folder, str(model)) for folder, _, model in self._solved], out_path)
        tasks: list[Task] = []
        for path, ((_, anchor, model), blocks) in zip(names, self._solved.items(), strict=True):
            require_writable(path, "save_alignment")
            require_alignment_or_nothing(path, "save_alignment")
            origin = self.origin(anchor, model, {name: block.settings for name, block in blocks.items()})
            solutions = tuple((name, block.solution) for name, block in blocks.items())
            tasks.append(
                SaveAlignment(path=str(path), origin=json.dumps(asdict(origin), sort_keys=True), solutions=solutions)
            )
        return tasks

    def origin(
        self, anchor: ModelReference, model: ModelReference, settings: Mapping[str, Mapping[str, Any]]
    ) -> Origin:
        """What a file belongs to, from the settings of each of its blocks."""
        agreed, differing = agreed_settings(settings)
        return Origin(
            anchor=str(anchor),
            model=str(model),
            anchor_fingerprint=self._fingerprint(anchor),
            model_fingerprint=self._fingerprint(model),
            family=self.checkpoints[model].family_name,
            sizes=sizes_of(self.checkpoints[model]),
            settings=agreed,
            versions=package_versions(),
            settings_by_block=differing,
        )

    def facts(self) -> dict[str, Any]:
        """What a report says of the files that were read; no folder of this machine."""
        return {
            str(model): {"file": published(file.path), "sha256": file.sha256}
            for (_, _, model), file in self._files.items()
        }

    def path(self, name: str) -> str:
        """Where a file is that the configuration names, by a path or an address on the Hub."""
        if name not in self._paths:
            self._paths[name] = str(local_file(name, ALIGNMENT, LoaderCache().hf_cache_dir))
        return self._paths[name]

    def _file(self, name: str, anchor: ModelReference, model: ModelReference) -> AlignmentFile:
        key = (self.path(name), anchor, model)
        if key not in self._files:
            self._files[key] = self._checked(Path(key[0]), anchor, model)
        return self._files[key]

    def _checked(self, path: Path, anchor: ModelReference, model: ModelReference) -> AlignmentFile:
        file = AlignmentFile.open(path)
        checkpoint = self.checkpoints[model]
        file.require_family(checkpoint.family_name, sizes_of(checkpoint), str(model))
        file.require_anchor(str(anchor), self._fingerprint(anchor))
        file.require_model(str(model), self._fingerprint(model))
        require_known_blocks(file, checkpoint.layout)
        return file

    def _fingerprint(self, model: ModelReference) -> str:
        if model not in self._fingerprints:
            self._fingerprints[model] = fingerprint_of(model)
        return self._fingerprints[model]


def agreed_settings(by_block: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings that all blocks share, `DIFFERS` where they do not, and the differing ones of each block."""
    names = list(dict.fromkeys(name for settings in by_block.values() for name in settings))
    values = {name: {json.dumps(settings.get(name)) for settings in by_block.values()} for name in names}
    agreed = {name: json.loads(next(iter(of))) if len(of) == 1 else DIFFERS for name, of in values.items()}
    differing = [name for name, of in values.items() if len(of) > 1]
    own = {block: {name: settings.get(name) for name in differing} for block, settings in by_block.items()}
    return agreed, own if differing else {}


def package_versions() -> dict[str, str]:
    """Of what alignments and statistics depend on."""
    others = {name: metadata.version(name) for name in ("mergekit", "torch", "transformers")}
    return {"mergekit_symalign": __version__, **others}


def sizes_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What two models must share, by name."""
    layout = checkpoint.layout
    towers = {f"{name}.{size}": x for name, of in layout.towers.items() for size, x in _sizes(of).items()}
    return _sizes(layout) | towers


def _sizes(layout: ModelLayout) -> dict[str, Any]:
    return {"layers": layout.layers, **asdict(layout.geometry)}


def has_halves(checkpoint: Checkpoint) -> bool:
    """Whether any tensor is stored in float16."""
    return any(header.dtype is torch.float16 for header in checkpoint.headers.values())


def require_same_layers(what: str, tensor: str, anchor_layer: Layer, model_layer: Layer) -> None:
    """An alignment file pairs each layer of a model with the same layer of the anchor.

    Raises:
        ConfigError: if a merge pairs others.
    """
    if anchor_layer != model_layer:
        raise ConfigError(
            f"parameter {what}",
            f"tensor {tensor} pairs {layer_name(model_layer)} of the model with {layer_name(anchor_layer)} of the "
            "anchor, and an alignment file pairs equal layers only",
            f"Leave {what} out for these slices",
        )
