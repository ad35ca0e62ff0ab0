"""Alignments from files and into files, inside a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache

from mergekit_symalign import __version__
from mergekit_symalign.alignment_file import AlignmentFile, Origin, block_name, save_alignment
from mergekit_symalign.errors import AlignmentFileError, ConfigError
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.file_names import file_stem
from mergekit_symalign.fingerprint import fingerprint
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.report import readable_errors
from mergekit_symalign.symmetry.element import BlockElement

SourceBlock = Tuple[int, BlockKind]  # layer of the model, which is also the anchor's


class ReadBlock(Task[Dict[str, Any]]):
    """The element of one block, from a file; stands where `SolveBlock` stands.

    Attributes:
        path: of the file.
        sha256: of its numbers when the merge was planned.
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

    def execute(self) -> Dict[str, Any]:
        with readable_errors():
            file = AlignmentFile.described(Path(self.path))
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


@dataclass
class Alignments:
    """The alignment files that a merge reads and writes.

    Attributes:
        checkpoints: the models of the merge.
    """

    checkpoints: Mapping[ModelReference, Checkpoint]
    _files: dict[tuple[str, ModelReference, ModelReference], AlignmentFile] = field(default_factory=dict)
    _fingerprints: dict[ModelReference, str] = field(default_factory=dict)
    _solved: dict[tuple[str, ModelReference, ModelReference], dict[str, Task]] = field(default_factory=dict)
    _settings: dict[str, Any] = field(default_factory=dict)

    def read(self, path: str, anchor: ModelReference, model: ModelReference, block: SourceBlock) -> tuple[str, str]:
        """Digest and block name for a `ReadBlock`, once the file was found to belong to these models.

        Raises:
            AlignmentFileError: if it does not, or does not have this block.
        """
        key = (path, anchor, model)
        if key not in self._files:
            self._files[key] = self._checked(Path(path), anchor, model)
        file, name = self._files[key], block_name(block[0], block[1].value)
        if name not in file.blocks:
            raise AlignmentFileError(
                file.label,
                f"it has nothing for {name}: the merge that saved it did not align that block",
                "Solve it for the whole model: mergekit-symalign solve",
            )
        return file.sha256, name

    def record(
        self,
        folder: str,
        anchor: ModelReference,
        model: ModelReference,
        block: SourceBlock,
        solution: Task,
        settings: Mapping[str, Any],
    ) -> None:
        """Remember that the solution of a block is to be saved."""
        self._settings = dict(settings)
        self._solved.setdefault((folder, anchor, model), {}).setdefault(block_name(block[0], block[1].value), solution)

    def save_tasks(self) -> list[Task]:
        """One file for each model that was aligned."""
        names: dict[tuple[str, str], int] = {}
        tasks = []
        for (folder, anchor, model), blocks in self._solved.items():
            name = file_stem(str(model))
            key = (folder, name.casefold())  # where names differ in case only, macOS and Windows see one file
            count = names[key] = names.get(key, 0) + 1
            file = f"{name}.safetensors" if count == 1 else f"{name}-{count}.safetensors"
            origin = self.origin(anchor, model, self._settings)
            tasks.append(
                SaveAlignment(
                    path=str(Path(folder) / file),
                    origin=json.dumps(asdict(origin), sort_keys=True),
                    solutions=tuple(blocks.items()),
                )
            )
        return tasks

    def origin(self, anchor: ModelReference, model: ModelReference, settings: Mapping[str, Any]) -> Origin:
        layout = self.checkpoints[model].layout
        versions = {name: metadata.version(name) for name in ("mergekit", "torch", "transformers")}
        return Origin(
            anchor=str(anchor),
            model=str(model),
            anchor_fingerprint=self._fingerprint(anchor),
            model_fingerprint=self._fingerprint(model),
            family=layout.family.name,
            sizes=sizes_of(self.checkpoints[model]),
            settings=settings,
            versions={"mergekit_symalign": __version__, **versions},
        )

    def _checked(self, path: Path, anchor: ModelReference, model: ModelReference) -> AlignmentFile:
        file = AlignmentFile.open(path)
        checkpoint = self.checkpoints[model]
        file.require_family(checkpoint.layout.family.name, sizes_of(checkpoint), str(model))
        file.require_anchor(str(anchor), self._fingerprint(anchor))
        file.require_model(str(model), self._fingerprint(model))
        return file

    def _fingerprint(self, model: ModelReference) -> str:
        if model not in self._fingerprints:
            self._fingerprints[model] = fingerprint(LoaderCache().get(model).index)
        return self._fingerprints[model]


def sizes_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What two models must share, by name."""
    return {"layers": checkpoint.layout.layers, **asdict(checkpoint.layout.geometry)}


def require_same_layers(what: str, tensor: str, anchor_layer: int, model_layer: int) -> None:
    """An alignment file pairs each layer of a model with the same layer of the anchor.

    Raises:
        ConfigError: if a merge pairs others.
    """
    if anchor_layer != model_layer:
        raise ConfigError(
            f"parameter {what}",
            f"tensor {tensor} pairs layer {model_layer} of the model with layer {anchor_layer} of the anchor, and an "
            "alignment file pairs equal layers only",
            f"Leave {what} out for these slices",
        )
