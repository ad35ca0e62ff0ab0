"""What a merge with statistics refuses before any work, and what it warns of."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence

from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.errors import ParameterError, SymmetryError
from mergekit_symalign.families.schema import ATTENTION_AXES, MLP_AXES
from mergekit_symalign.graph.alignments import ReadBlock
from mergekit_symalign.graph.ready import Ready
from mergekit_symalign.graph.statistics import Lookup
from mergekit_symalign.symmetry.element import Fused, axis_names
from mergekit_symalign.symmetry.statistics import only_reorders

LOG = logging.getLogger(__name__)

_LIMITS = {"off_diagonal": (0.0, 1.0), "ridge": (0.0, math.inf), "epsilon": (0.0, math.inf)}
_SHOWN = 3  # tensors, in a warning


def require_limits(one: Ready) -> None:
    """
    Raises:
        ParameterError: if a number lies where it makes no sense.
    """
    for name, (least, most) in _LIMITS.items():
        if name in one.planned.parameters:
            value = one.asked(name)
            if not (least <= value <= most and math.isfinite(value)):
                allowed = f"between {least:g} and {most:g}" if math.isfinite(most) else f"at least {least:g}"
                raise ParameterError(
                    f"parameter {name}", f"it is {value:g} for {one.name}, but must be {allowed}", "Correct the value"
                )


def shares_of(one: Ready) -> dict[ModelReference, float]:
    """The weight of every model that is to be merged; those of weight 0 are left out.

    Raises:
        ParameterError: if one is negative or not finite, or all are 0.
    """
    shares = {m: float(one.asked("weight", m)) for m in one.order if m != one.base}
    for model, share in shares.items():
        if not math.isfinite(share) or share < 0:
            raise ParameterError(
                f"parameter weight of model {model}",
                f"it is {share:g} for {one.name}, but statistics are weighted by it, so it cannot be negative",
                "Give a weight of at least 0",
            )
    if not any(shares.values()):
        raise ParameterError("parameter weight", f"it is 0 for all models ({one.name})", "Give one of them a weight")
    return {model: share for model, share in shares.items() if share > 0}


def require_agreement(weight: Ready, bias: Ready) -> None:
    """A layer's weight and bias are found together.

    Raises:
        ParameterError: if a parameter is not the same for both.
    """
    names = ("weight", "statistics")
    pairs = [
        (f"{name} of model {m}", *(x.asked(name, m) for x in (weight, bias))) for name in names for m in weight.order
    ]
    shared = ("off_diagonal", "ridge", "lambda", "epsilon", "normalize_fisher")
    known = [name for name in shared if name in weight.planned.parameters]
    pairs += [(name, weight.asked(name), bias.asked(name)) for name in known]
    for name, one, other in pairs:
        if one != other:
            raise ParameterError(
                f"parameter {name}",
                f"it is {one} for {weight.name} and {other} for {bias.name}, but a layer's weight and bias are found "
                "together",
                "Choose filters that give both the same value",
            )


def require_reordered(one: Ready, moves: Sequence[Task | None], axes: Sequence[str | Fused], what: str) -> None:
    """Statistics of squares follow a model only where its alignment reorders.

    Args:
        one: the tensor.
        moves: the solution of each aligned model's block.
        axes: along which the statistics lie.
        what: they are, for the error.

    Raises:
        ParameterError: if what the parameters ask for, or a saved alignment, may turn or scale along one of the axes.
    """
    names = {name for axis in axes for name in axis_names(axis)}
    for move in (move for move in moves if move is not None):
        if isinstance(move, ReadBlock):
            _require_file_reorders(one, move, names, what)
        elif (asked := _may_calculate(one, names)) is not None:
            raise ParameterError(
                f"parameter {asked}",
                f"it lets the alignment turn or scale {one.name}, and {what} follow a model only where it is reordered",
                _REMEDY,
            )


_REMEDY = (
    "Use rotation: none and scaling: false; or align first (mergekit-symalign solve and apply), measure the aligned "
    "model, and merge without alignment"
)


def _may_calculate(one: Ready, names: set[str]) -> str | None:
    """The parameter that lets a solve do more than reorder along these axes."""
    if names & ATTENTION_AXES:
        if one.asked("rotation") != "none":
            return "rotation"
        return "scaling" if one.asked("scaling") else None
    return "neuron_scaling" if names & MLP_AXES and one.asked("neuron_scaling") else None


def _require_file_reorders(one: Ready, move: ReadBlock, names: set[str], what: str) -> None:
    file = move.file()
    element = file.element(move.block)
    if not only_reorders(element, sorted(names)):
        raise SymmetryError(
            file.label,
            f"it turns or scales {one.name}, and {what} follow a model only where it is reordered",
            _REMEDY,
        )


def warn_of_few_tokens(read: Sequence[tuple[Lookup, int]]) -> None:
    """Say which statistics are of fewer tokens than their layers have inputs."""
    few: dict[str, list[str]] = defaultdict(list)
    least: dict[str, int] = {}
    for lookup, inputs in read:
        tokens = lookup.file.tokens(lookup.name)
        if isinstance(tokens, int) and tokens < inputs:
            label = lookup.file.label
            few[label].append(lookup.name)
            least[label] = min(tokens, least.get(label, tokens))
    for label, names in few.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        LOG.warning(
            "%s: of %d tokens, fewer than %s%s have inputs. Measure with more tokens",
            label,
            least[label],
            ", ".join(names[:_SHOWN]),
            more,
        )
