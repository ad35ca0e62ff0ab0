"""The tensors of a layer, or of what lies outside the layers, in a form in which the stream's coordinates are free.

A reader behind a norm sees ``W diag(γ) n(x)``, and ``n`` commutes with a rotation while the gain ``γ`` does not. So a
scope is rotated in its *folded* form: gains go into the readers, biases of norms into the readers' biases. What is left
has the stream as an ordinary axis. `unfolded` then gives the scope any gains and biases without changing what it
computes: the anchor's, so that anchor and model share their norms (docs/symmetries.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.symmetry.element import TensorAxes
from mergekit_symalign.symmetry.options import BlockShape, Symmetries
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM
from mergekit_symalign.symmetry.rows import compute_dtype

VOCABULARY = "vocabulary"
FLOOR = 1e-2  # of a gain's root mean square: smaller gains are no divisors

Tensors = Mapping[str, Tensor]
NormWeights = Mapping[str, tuple[Tensor, Tensor | None]]  # name of the gain -> gain and bias, as weights


@dataclass(frozen=True)
class Norm:
    """A norm on the stream.

    Attributes:
        gain: name of its gain.
        bias: name of its bias; None if it has none.
        readers: names of the weights that read its output, if nothing else does; none where it goes on along the
            stream.
        reader_biases: their biases; none unless every reader has one.
    """

    gain: str
    bias: str | None = None
    readers: tuple[str, ...] = ()
    reader_biases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """An attention block or MLP.

    Attributes:
        shape: of its heads or neurons.
        parts: names of its tensors.
        use: symmetries that it may use.
    """

    shape: BlockShape
    parts: tuple[str, ...]
    use: Symmetries = field(default_factory=Symmetries)


@dataclass(frozen=True)
class Scope:
    """A layer, or what lies outside the layers.

    Attributes:
        axes: of every tensor, by name; gains of norms have ``residual_gain`` where others have ``residual``.
        norms: on the stream.
        blocks: by kind.
    """

    axes: Mapping[str, TensorAxes]
    norms: tuple[Norm, ...] = ()
    blocks: Mapping[str, Block] = field(default_factory=dict)


def around(scope: Scope, names: Collection[str], *, folds: bool) -> Scope:
    """The scope of some tensors, with all others that their moved form depends on.

    Args:
        scope: of a layer, or of what lies outside the layers.
        names: of the tensors.
        folds: whether gains go into the readers (`ResidualKind.rotates`).
    """
    if not folds:
        return _part(scope, names, ())
    norms = tuple(norm for one in scope.norms if (norm := _touched(one, names)) is not None)
    return _part(scope, {*names, *(name for norm in norms for name in _names(norm))}, norms)


def _touched(norm: Norm, names: Collection[str]) -> Norm | None:
    """A norm with those of its readers that are, or whose biases are, among some tensors; None if nothing of it is."""
    pairs = zip_longest(norm.readers, norm.reader_biases)
    touched = [(reader, bias) for reader, bias in pairs if reader in names or bias in names]
    if not touched and not {norm.gain, norm.bias} & set(names):
        return None
    if not touched and norm.reader_biases:
        touched = [(norm.readers[0], norm.reader_biases[0])]  # they tell that the norm's bias goes into the readers
    biases = tuple(bias for _, bias in touched if bias is not None)
    return replace(norm, readers=tuple(reader for reader, _ in touched), reader_biases=biases)


def _names(norm: Norm) -> tuple[str, ...]:
    own = (norm.gain,) if norm.bias is None else (norm.gain, norm.bias)
    return (*own, *norm.readers, *norm.reader_biases)


def _part(scope: Scope, names: Collection[str], norms: tuple[Norm, ...]) -> Scope:
    parts = {kind: tuple(part for part in block.parts if part in names) for kind, block in scope.blocks.items()}
    blocks = {kind: replace(scope.blocks[kind], parts=found) for kind, found in parts.items() if found}
    return Scope({name: axes for name, axes in scope.axes.items() if name in names}, norms, blocks)


def stream_axes(axes: TensorAxes) -> int:
    """How many axes of a tensor are the stream's."""
    return sum(axis in (STREAM, GAIN) for axis in axes.names)


def folded(scope: Scope, tensors: Tensors) -> dict[str, Tensor]:
    """Gains and biases of norms inside the tensors that read them.

    Where the readers have no biases, the norm's bias stays, in units of its gain.

    Raises:
        SymmetryError: if such a bias stands beside a gain of 0.
    """
    result = dict(tensors)
    for norm in scope.norms:
        gain, bias = norm_weights(scope, tensors, norm)
        del result[norm.gain]
        for reader in norm.readers:
            result[reader] = _times(tensors[reader], scope.axes[reader], gain)
        if bias is None or norm.bias is None:
            continue
        if not norm.reader_biases:
            result[norm.bias] = _in_units(bias, gain, norm.gain)
            continue
        del result[norm.bias]
        for reader, name in zip(norm.readers, norm.reader_biases, strict=True):
            result[name] = tensors[name] + _read_off(tensors[reader], scope.axes[reader], bias)
    return result


def unfolded(scope: Scope, tensors: Tensors, norms: NormWeights) -> dict[str, Tensor]:
    """The inverse of `folded`, with norms of one's choice.

    Args:
        scope: of the tensors.
        tensors: in their folded form.
        norms: gain and bias of every norm, as weights; gains without zeros. The bias is used where the readers have
            biases, which then take up the difference.
    """
    result = dict(tensors)
    for norm in scope.norms:
        gain, bias = norms[norm.gain]
        result[norm.gain] = scope.axes[norm.gain].write(gain)
        for reader in norm.readers:
            result[reader] = _times(tensors[reader], scope.axes[reader], 1 / gain)
        if norm.bias is None:
            continue
        if bias is None or not norm.reader_biases:
            result[norm.bias] = tensors[norm.bias] * gain
            continue
        result[norm.bias] = bias
        for reader, name in zip(norm.readers, norm.reader_biases, strict=True):
            result[name] = tensors[name] - _read_off(result[reader], scope.axes[reader], bias)
    return result


def norms_of(scope: Scope, tensors: Tensors) -> NormWeights:
    """Gains, with a floor, and biases of all norms of a scope, as they may be given to `unfolded`."""
    found = {norm.gain: norm_weights(scope, tensors, norm) for norm in scope.norms}
    return {name: (floored(gain), bias) for name, (gain, bias) in found.items()}


def norm_weights(scope: Scope, tensors: Tensors, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """Gain and bias of one norm, as weights."""
    gain = _computed(scope.axes[norm.gain].read(tensors[norm.gain]))
    return gain, None if norm.bias is None else _computed(tensors[norm.bias])


def floored(gain: Tensor) -> Tensor:
    """The same gain with numbers next to zero moved away from it: readers are divided by them."""
    least = FLOOR * gain.square().mean().sqrt()
    away = torch.where(gain < 0, -least, least)
    return torch.where(gain.abs() <= least, torch.where(away == 0, torch.ones_like(gain), away), gain)


def _times(x: Tensor, axes: TensorAxes, gain: Tensor) -> Tensor:
    """A reader with its stream axis multiplied by ``gain``."""
    shape = [-1 if name == STREAM else 1 for name in axes.names]
    return axes.write(_computed(axes.read(x)) * gain.reshape(shape))


def _read_off(x: Tensor, axes: TensorAxes, bias: Tensor) -> Tensor:
    """What a reader makes of a norm's bias: ``W β``."""
    return _computed(axes.read(x)).movedim(axes.names.index(STREAM), -1) @ bias


def _computed(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _in_units(bias: Tensor, gain: Tensor, name: str) -> Tensor:
    lost = (gain == 0) & (bias != 0)
    if bool(lost.any()):
        raise SymmetryError(
            f"norm {name}",
            f"{int(lost.sum())} of its gains are 0 beside a bias that is not, and its readers have no biases",
            "Use residual: permutation",
        )
    return torch.where(gain == 0, torch.zeros_like(bias), bias / torch.where(gain == 0, 1, gain))
