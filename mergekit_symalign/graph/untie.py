"""``untie: true``: models whose head is their embedding get a head of their own, so that the two may part ways.

MergeKit plans a head only where a model stores one. Planning it for all of them (`planned_head`) is enough: a load of a
tied head finds the embedding. The config of the output then says that there are two (`untie_config`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference

from mergekit_symalign.errors import ArchitectureError, ParameterError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.stream import embedding_name, heads_of, may_untie, ties_embeddings
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.planned import Planned

LOG = logging.getLogger(__name__)

UNTIE = "untie"
TIED = "tie_word_embeddings"
_REMEDY = "Leave untie out, and use residual: permutation, which tied models admit"


def planned_head(weight: WeightInfo, layout: ModelLayout, asked: Callable[[], bool]) -> WeightInfo:
    """A tensor of the output as MergeKit is to plan it: a head that is to be untied is not optional.

    Args:
        weight: of the output.
        layout: of a model.
        asked: the parameter ``untie`` for this tensor.
    """
    return weight.model_copy(update={"optional": False}) if weight.name in heads_of(layout) and asked() else weight


def is_untied(planned: Sequence[Planned]) -> bool:
    """The parameter ``untie``, which belongs to the whole merge.

    Raises:
        ParameterError: if tensors disagree.
    """
    first, task = planned[0]
    wanted: bool = task.parameters[UNTIE]
    for weight, other in planned[1:]:
        if other.parameters[UNTIE] != wanted:
            raise ParameterError(
                f"parameter {UNTIE}",
                f"it is {wanted} for {first.name} and {not wanted} for {weight.name}, but the output has one config",
                "Give it one value, without filters",
            )
    return wanted


def models_to_untie(
    planned: Sequence[Planned], checkpoints: Mapping[ModelReference, Checkpoint]
) -> tuple[ModelReference, ...]:
    """The models whose embedding becomes their head, if that is asked for; says so where there is nothing to untie.

    Raises:
        ParameterError: if tensors disagree on the parameter.
        ArchitectureError: if a model cannot have a head of its own.
    """
    if not is_untied(planned):
        return ()
    found = tuple(m for m, checkpoint in checkpoints.items() if ties_embeddings(checkpoint.config, checkpoint.layout))
    names = {weight.name for weight, _ in planned}
    tied = tuple(m for m in found if _require_possible(checkpoints[m], names))
    if not tied:
        LOG.info("untie: no model of this merge has its embedding for a head, so there is nothing to untie")
    return tied


def is_tied(checkpoints: Iterable[Checkpoint], planned: Sequence[Planned]) -> bool:
    """Whether the embedding of any model is its head, and stays so."""
    return not is_untied(planned) and any(ties_embeddings(one.config, one.layout) for one in checkpoints)


def require_files(tied: Sequence[ModelReference]) -> None:
    """
    Raises:
        ParameterError: if heads are to be untied in a merge that writes no config.
    """
    if tied:
        raise ParameterError(
            f"parameter {UNTIE}",
            f"the merge is planned in memory, which writes no config that says so ({TIED}: false)",
            "Leave it out, or merge to files",
        )


def untie_config(config: Any) -> None:
    """Let the config of a model say that its head is not its embedding."""
    for part in (config, getattr(config, "text_config", None)):
        if hasattr(part, TIED):
            setattr(part, TIED, False)


def untie_config_file(path: Path) -> None:
    """The same for the file of a config."""
    config = json.loads(path.read_text("utf-8"))
    for part in (config, config.get("text_config")):
        if part is not None:
            part[TIED] = False
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def tied_to_embedding(checkpoint: Checkpoint) -> frozenset[str]:
    """All names in the model of its embedding: those of heads among them are tied to it."""
    embedding = checkpoint.names.place(embedding_name(checkpoint.layout) or "")
    return frozenset() if embedding is None else checkpoint.names.tied(embedding.name)


def require_parting(checkpoint: Checkpoint) -> bool:
    """Whether a model's head is its embedding indeed: the configs of models without a head may say so as well.

    Raises:
        ArchitectureError: if it must stay so.
    """
    where, tied = _where(checkpoint), tied_to_embedding(checkpoint)
    if not may_untie(checkpoint.layout):
        raise ArchitectureError(where, "models of this family have their embedding for a head", _REMEDY)
    if len(tied) < 2:
        return False
    if more := checkpoint.names.all_tied() - tied:
        names = ", ".join(sorted(more))
        raise ArchitectureError(
            where, f"more is tied than the matrix of the head, and would part with it ({names})", _REMEDY
        )
    return True


def _require_possible(checkpoint: Checkpoint, planned: set[str]) -> bool:
    """`require_parting`, and a head that MergeKit plans."""
    if not require_parting(checkpoint):
        return False
    if not planned & heads_of(checkpoint.layout):
        reason = "MergeKit's architecture file has no head that could be written"
        raise ArchitectureError(_where(checkpoint), reason, _REMEDY)
    return True


def _where(checkpoint: Checkpoint) -> str:
    return f"{UNTIE} with {checkpoint.layout.family.title} (model {checkpoint.model})"
