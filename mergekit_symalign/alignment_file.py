"""An alignment as a file: the group elements themselves, and what they belong to.

A safetensors file. Its tensors are the elements' own numbers (permutations as int32; angles, scales and orthogonal
matrices as they were solved, so that a merge from the file is the merge that saved it, bit for bit). Numbers that
repeat, along the query heads of a group or between axes, are stored once. One metadata entry, a JSON text, holds
the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from mergekit_symalign.errors import AlignmentFileError, OtherModelsError
from mergekit_symalign.symmetry.element import BlockElement, unpack
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.whole_file import written_whole

FORMAT = 1
_ENTRY = "mergekit_symalign"
BlockName = str  # "layer 3 mlp": how a block is called in a file
Steps = list[list[Any]]  # [[kind, [reference, …]], …]; a reference is [tensor's name, repeats]


@dataclass(frozen=True)
class Origin:
    """What an alignment belongs to, and how it was found.

    Attributes:
        anchor, model: names, for people.
        anchor_fingerprint, model_fingerprint: of their checkpoints (fingerprint.py).
        family: the family file.
        sizes: geometry that both share, by name.
        settings: parameters of the solve.
        versions: of the packages that solved it.
    """

    anchor: str
    model: str
    anchor_fingerprint: str
    model_fingerprint: str
    family: str
    sizes: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def block_name(layer: int, kind: str) -> BlockName:
    return f"layer {layer} {kind}"


def save_alignment(
    path: Path,
    origin: Origin,
    elements: Mapping[BlockName, BlockElement],
    facts: Mapping[BlockName, Mapping[str, Any]] | None = None,
) -> None:
    """Write an alignment; the file appears under its name only when it is whole.

    Args:
        path: of the file.
        origin: what the alignment belongs to.
        elements: of each block.
        facts: what is known of each block's solve, for the reports of merges that use the file.
    """
    store = _Store()
    blocks = {
        block: {axis: store.steps(f"{block} {axis}", action) for axis, action in element.actions.items()}
        for block, element in elements.items()
    }
    content = {"format": FORMAT, "origin": asdict(origin), "blocks": blocks, "facts": dict(facts or {})}
    content["sha256"] = _digest(store.tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        safetensors_torch.save_file(store.tensors, scratch, metadata={_ENTRY: json.dumps(content)})


@dataclass(frozen=True)
class AlignmentFile:
    """A file that was opened and found sound.

    Attributes:
        path: where it is.
        origin: what it belongs to.
        blocks: by name of block and axis, the steps of the element.
        sha256: of its numbers.
        facts: what was known of each block when it was solved; empty for files that do not say.
    """

    path: Path
    origin: Origin
    blocks: Mapping[BlockName, Mapping[str, Steps]]
    sha256: str
    facts: Mapping[BlockName, Mapping[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> AlignmentFile:
        """Read the metadata and check every number.

        Raises:
            AlignmentFileError: if the file is absent, of another kind, of a newer format, or damaged.
        """
        found = AlignmentFile.described(path)
        if _digest(safetensors_torch.load_file(path)) != found.sha256:
            raise _unusable(path, "its numbers are damaged: they are not those that were saved")
        return found

    @staticmethod
    def described(path: Path) -> AlignmentFile:
        """Read the metadata alone. Raises as `open` does, but for the numbers."""
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_ENTRY)
        except (OSError, SafetensorError) as error:
            raise _unusable(path, f"it cannot be read ({error})") from error
        if text is None:
            raise _unusable(path, "it is a safetensors file, but not an alignment")
        try:
            content = json.loads(text)
            if content["format"] > FORMAT:
                raise AlignmentFileError(
                    f"alignment {path}",
                    f"its format is {content['format']}, newer than the {FORMAT} that this version reads",
                    "Install a newer mergekit-symalign",
                )
            origin, facts = Origin(**content["origin"]), content.get("facts", {})
            return AlignmentFile(path, origin, content["blocks"], content["sha256"], facts)
        except (ValueError, KeyError, TypeError) as error:
            raise _unusable(path, f"its metadata are damaged ({error})") from error

    def element(self, block: BlockName) -> BlockElement:
        """The element of one block; only its own tensors are read."""
        with safe_open(self.path, framework="pt") as file:
            return BlockElement({axis: _action(file, steps) for axis, steps in self.blocks[block].items()})

    @cached_property
    def label(self) -> str:
        return f"alignment {self.path}"

    def require_family(self, family: str, sizes: Mapping[str, Any], model: str) -> None:
        """
        Raises:
            OtherModelsError: if the model is of another family or size.
        """
        if self.origin.family != family:
            raise OtherModelsError(
                self.label,
                f"it is for family {self.origin.family}, and model {model} is of family {family}",
                "Use an alignment that was solved for this model",
            )
        differences = [f"{k} {v} != {sizes.get(k)}" for k, v in self.origin.sizes.items() if sizes.get(k) != v]
        if differences:
            raise OtherModelsError(
                self.label,
                f"it is for another size than model {model}: {', '.join(differences)}",
                "Use an alignment that was solved for this model",
            )

    def require_model(self, name: str, fingerprint: str) -> None:
        """
        Raises:
            OtherModelsError: if it was solved for another checkpoint.
        """
        self._require("model", self.origin.model, self.origin.model_fingerprint, name, fingerprint)

    def require_anchor(self, name: str, fingerprint: str) -> None:
        """
        Raises:
            OtherModelsError: if it was solved towards another checkpoint.
        """
        self._require("anchor", self.origin.anchor, self.origin.anchor_fingerprint, name, fingerprint)

    def _require(self, role: str, known: str, wanted: str, name: str, fingerprint: str) -> None:
        if fingerprint != wanted:
            raise OtherModelsError(
                self.label,
                f"it was solved for {role} {known}, and {name} has other weights (fingerprint {fingerprint[:12]}, not "
                f"{wanted[:12]})",
                f"Solve it again: mergekit-symalign solve ANCHOR MODEL -o {self.path}",
            )


class _Store:
    """Tensors by name, equal ones once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[bytes, str] = {}

    def steps(self, name: str, action: AxisAction) -> Steps:
        parts = [(kind, numbers) for step in action.pack() for kind, numbers in step.items()]
        return [
            [kind, [self._reference(f"{name} {i} {kind} {j}", x) for j, x in enumerate(numbers)]]
            for i, (kind, numbers) in enumerate(parts)
        ]

    def _reference(self, name: str, x: Tensor) -> tuple[str, int]:
        x = x.detach().to(x.dtype if x.is_floating_point() else torch.int32)
        repeats = _repeats(x)
        x = x.unflatten(0, (-1, repeats)).select(1, 0).contiguous()
        content = safetensors_torch.save({"x": x})
        if content not in self._names:
            self._names[content] = name
            self.tensors[name] = x
        return self._names[content], repeats


def _repeats(x: Tensor) -> int:
    """How often every matrix along the first axis is repeated (an action of KV heads, for each query head)."""
    if x.ndim < 2 or len(x) < 2:
        return 1
    changes = (x.narrow(0, 1, len(x) - 1) != x.narrow(0, 0, len(x) - 1)).flatten(1).any(1)
    return gcd(len(x), *(torch.nonzero(changes).flatten() + 1).tolist())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(safetensors_torch.save(dict(sorted(tensors.items())))).hexdigest()


def _action(file: Any, steps: Steps) -> AxisAction:
    packed = []
    for kind, references in steps:
        numbers = tuple(_number(file.get_tensor(name), repeats) for name, repeats in references)
        packed.append({kind: numbers})
    return unpack(packed)


def _number(x: Tensor, repeats: int) -> Tensor:
    x = x.long() if not x.is_floating_point() else x
    return x.repeat_interleave(repeats, dim=0) if repeats > 1 else x


def _unusable(path: Path, reason: str) -> AlignmentFileError:
    return AlignmentFileError(
        f"alignment {path}", reason, "Give a file that mergekit-symalign solve or save_alignment wrote"
    )
