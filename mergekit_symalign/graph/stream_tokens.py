"""Which rows of two models' vocabularies belong to the same tokens: the only ones by which their streams are compared.

An element of the residual stream moves the columns of embedding and head. So a model's stored rows are moved as they
stand, and MergeKit matches the vocabularies afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Tuple

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary

from mergekit_symalign.errors import CalibrationError, ConfigError
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.planned import Planned
from mergekit_symalign.graph.readers import tokenizer_of
from mergekit_symalign.symmetry.residual.scope import VOCABULARY, Scope

LOG = logging.getLogger(__name__)

_OF_ANY_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tekken.json")
Vocabulary = Mapping[str, int]  # token -> row
Loads = Mapping[str, LoadFinite]
Side = tuple[Checkpoint, Loads]


@dataclass(frozen=True)
class CommonTokens:
    """Rows of the same tokens, in the same order.

    Attributes:
        anchor, model: the rows of each.
        sizes: how many tokens each has.
    """

    anchor: tuple[int, ...]
    model: tuple[int, ...]
    sizes: tuple[int, int]

    def is_everything(self, rows: tuple[int, int]) -> bool:
        """Whether these are all rows of both, in their own order."""
        return rows == (len(self.anchor),) * 2 and self.anchor == self.model

    def facts(self) -> dict[str, int]:
        """For the report."""
        return {"tokens": len(self.anchor), "tokens_anchor": self.sizes[0], "tokens_model": self.sizes[1]}


@dataclass(frozen=True)
class Compared:
    """What lies outside the layers of two models, as far as it belongs to the same tokens.

    Attributes:
        anchor, model: loads of each, by name in the scope.
        tokens: facts for the report; none where all rows count.
    """

    anchor: Loads
    model: Loads
    tokens: Mapping[str, int] = field(default_factory=dict)


class LoadTokens(LoadFinite):
    """Some rows of a tensor that has one for each token.

    Attributes:
        rows: which, in this order.
        axis: that they lie on.
    """

    rows: Tuple[int, ...]
    axis: int

    def __hash__(self) -> int:  # a vocabulary is long
        return hash((type(self).__name__, self.model, self.tensor, len(self.rows)))

    def execute(self) -> Optional[torch.Tensor]:
        x = super().execute()
        if x is None or self.rows == tuple(range(len(self.rows))):
            return None if x is None else x.narrow(self.axis, 0, len(self.rows))
        return x.index_select(self.axis, torch.tensor(self.rows, device=x.device))


@dataclass
class Vocabularies:
    """The tokenizers of a merge's models, each loaded once, and what they have in common.

    Attributes:
        options: of MergeKit.
        matched: whether MergeKit brings the models' vocabularies together.
    """

    options: MergeOptions
    matched: bool
    _known: dict[ModelReference, Vocabulary | None] = field(default_factory=dict)
    _common: dict[tuple[ModelReference, ModelReference], CommonTokens | None] = field(default_factory=dict)

    @staticmethod
    def of(planned: Sequence[Planned], options: MergeOptions) -> Vocabularies:
        """Those of a merge."""
        return Vocabularies(options, any(isinstance(task.gather_tensors, PermutedVocabulary) for _, task in planned))

    def compared(self, scope: Scope, anchor: Side, model: Side) -> Compared:
        """What tells how the streams of two models lie to each other outside their layers: rows of tokens of both.

        Args:
            scope: outside the layers.
            anchor, model: the two, with their loads of the tensors in the scope.

        Raises:
            ConfigError: as `common`.
        """
        rows = tuple(vocabulary_rows(scope, *side) for side in (anchor, model))
        first, second = rows
        if first is None or second is None:
            return Compared(anchor[1], model[1])
        pair = (anchor[0].model, model[0].model)
        if pair not in self._common:
            self._common[pair] = self.common(anchor[0], model[0], (first, second))
        found = self._common[pair]
        if found is None:
            return Compared(anchor[1], model[1])
        ours, theirs = (at_tokens(scope, loads, x) for loads, x in ((anchor[1], found.anchor), (model[1], found.model)))
        return Compared(ours, theirs, found.facts())

    def common(self, anchor: Checkpoint, model: Checkpoint, rows: tuple[int, int]) -> CommonTokens | None:
        """The tokens that two models have; None where row i of one belongs to row i of the other, for all i.

        So it is taken to be where a model has no tokenizer, and both have as many rows.

        Args:
            anchor, model: whose vocabularies.
            rows: how many rows each has, padding included.

        Raises:
            ConfigError: if they have no token in common, or nothing tells.
        """
        first, second = (self._of(one.model) for one in (anchor, model))
        if first is not None and second is not None:
            found = matched(first, second, rows)
            _require_tokens(found, anchor, model)
            if not self.matched and found.anchor != found.model:
                LOG.warning(
                    "model %s has tokens in other rows than the anchor %s, and this merge takes equal rows of all "
                    "models for the same token. Let MergeKit match the tokenizers: tokenizer: {source: base}",
                    model.model,
                    anchor.model,
                )
            return None if found.is_everything(rows) else found
        if rows[0] != rows[1] and not self.options.unsafe_truncate_embeddings:
            raise _without_tokenizer(anchor if first is None else model, anchor, model, rows)
        both = tuple(range(min(rows)))
        return None if rows[0] == rows[1] else CommonTokens(both, both, rows)

    def _of(self, model: ModelReference) -> Vocabulary | None:
        if model not in self._known:
            self._known[model] = vocabulary_of(model, self.options)
        return self._known[model]


def matched(anchor: Vocabulary, model: Vocabulary, rows: tuple[int, int]) -> CommonTokens:
    """The tokens of two vocabularies that are spelt alike, as MergeKit matches them, and have a row in both models.

    >>> matched({"a": 0, "b": 1, "c": 2}, {"c": 0, "a": 1, "d": 2}, (3, 3))
    CommonTokens(anchor=(0, 2), model=(1, 0), sizes=(3, 3))
    """
    one, other = ({t: i for t, i in v.items() if i < n} for v, n in zip((anchor, model), rows, strict=True))
    pairs = sorted((i, other[token]) for token, i in one.items() if token in other)
    return CommonTokens(tuple(i for i, _ in pairs), tuple(j for _, j in pairs), (len(one), len(other)))


def vocabulary_of(model: ModelReference, options: MergeOptions) -> Vocabulary | None:
    """What a model's tokenizer says; None if it has none."""
    try:
        tokenizer = tokenizer_of(model, options)
    except CalibrationError as error:
        LOG.info("model %s: %s: its rows are taken to be the same tokens as the anchor's", model, error.reason)
        return None
    return dict(tokenizer.get_vocab()) if _has_files(Path(model.model.path), tokenizer) else None


def at_tokens(scope: Scope, loads: Loads, rows: tuple[int, ...]) -> dict[str, LoadFinite]:
    """The loads of a scope, with some rows only of what has one for each token."""
    return {name: _some_rows(load, scope.axes[name].names, rows) for name, load in loads.items()}


def vocabulary_rows(scope: Scope, checkpoint: Checkpoint, loads: Loads) -> int | None:
    """How many rows a model has for tokens; None if it has no vocabulary.

    Args:
        scope: outside the layers.
        checkpoint: of the model.
        loads: of the tensors in the scope.
    """
    found = [
        (checkpoint.stored(_info(load)), scope.axes[name].names.index(VOCABULARY))
        for name, load in loads.items()
        if VOCABULARY in scope.axes[name].names
    ]
    return min((header.shape[axis] for header, axis in found if header is not None), default=None)


def _some_rows(load: LoadFinite, axes: tuple[Any, ...], rows: tuple[int, ...]) -> LoadFinite:
    return LoadTokens(**dict(load), rows=rows, axis=axes.index(VOCABULARY)) if VOCABULARY in axes else load


def _has_files(folder: Path, tokenizer: Any) -> bool:
    """Whether a tokenizer is a model's own: transformers makes one without any words where there are no files."""
    names = (*tokenizer.vocab_files_names.values(), *_OF_ANY_TOKENIZER)
    return not folder.is_dir() or any((folder / name).exists() for name in names)


def _info(load: LoadFinite) -> WeightInfo:
    return WeightInfo(name=load.tensor, aliases=load.aliases, tied_names=load.tied_names)


def _require_tokens(found: CommonTokens, anchor: Checkpoint, model: Checkpoint) -> None:
    """
    Raises:
        ConfigError: if there are none.
    """
    common, hidden = len(found.anchor), anchor.layout.geometry.hidden
    sizes = f"{found.sizes[0]} tokens of {anchor.model} and {found.sizes[1]} of {model.model}"
    if not common:
        raise ConfigError(
            "parameter residual",
            f"the residual stream is aligned by rows of the same token, but of the {sizes} none is in both",
            "Use residual: none, or models whose tokenizers share tokens",
        )
    if common < hidden:
        LOG.warning(
            "of the %s only %d are in both, fewer than the models' hidden size of %d: the vocabulary does not tell "
            "where every coordinate of the residual stream belongs",
            sizes,
            common,
            hidden,
        )


def _without_tokenizer(
    unknown: Checkpoint, anchor: Checkpoint, model: Checkpoint, rows: tuple[int, int]
) -> ConfigError:
    return ConfigError(
        "parameter residual",
        f"the residual stream is aligned by rows of the same token, but {anchor.model} has {rows[0]} rows and "
        f"{model.model} has {rows[1]}, and {unknown.model} has no tokenizer that says which row is whose",
        "Put the model's tokenizer files beside its weights",
    )
