"""Part 9: a skill that one model learnt, added to another one of another initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .apart_merges import LEARNED, NONE, Pair, arms, between, filled
from .apart_models import Models, load, measured
from .apart_text import Corpus, windows
from .apart_transport import masked, transported
from .models import State, load_state
from .store import Row

Measure = Callable[[str, int, str, str, Callable[[], Row]], Row]
SHARES = {"into": 1.0, "midpoint": 0.5}  # of the second model in what the skill is added to
GRADFIX, THESEUS = "gradfix", "theseus"
MASKED = (NONE, "rotation", LEARNED)  # arms that GradFix is tried on
EXAMPLES = 8  # windows of the skill for GradFix
MAPPED = 32  # windows of the first text for Theseus


@dataclass(frozen=True)
class Transfers:
    """The skill of a pair's anchor, moved into its second model.

    Attributes:
        seed: of the anchor; number: of the pair.
        measure: stores a row.
    """

    models: Models
    shape: str
    seed: int
    number: int
    pair: Pair
    measure: Measure

    def run(self) -> None:
        """Measure what is missing."""
        part = f"{self.shape}-skills"
        for name, make in self._home().items():
            self.measure(part, self.seed, name, "home", lambda m=make: self._abilities(m()))
        for name, variant, make in self._moved():
            self.measure(part, self.number, name, variant, lambda m=make: self._abilities(m()))

    def _home(self) -> dict[str, Callable[[], State]]:
        """The ceiling: the skill where it was learnt, and in another version of that model."""
        version = self.models.version(self.shape, self.seed)
        return {
            "anchor": lambda: load_state(self.pair.anchor),
            "skilled": lambda: load_state(self.models.skilled(self.shape, self.seed)),
            "version": lambda: load_state(version),
            "version-skilled": lambda: _added(load_state(version), self._vector),
        }

    def _moved(self) -> Iterator[tuple[str, str, Callable[[], State]]]:
        """Arm, variant, and what makes the model."""
        yield "model", "alone", lambda: load_state(self.pair.model)
        for arm in arms():
            for variant, share in SHARES.items():
                yield arm, variant, lambda a=arm, s=share: _added(self._between(a, s), self._vector)
        for arm in MASKED:
            yield arm, GRADFIX, lambda a=arm: self._masked(a)
        yield THESEUS, "into", self._transported

    def _between(self, arm: str, share: float) -> State:
        return between(load_state(self.pair.anchor), load_state(self.pair.aligned(arm)), share)

    def _masked(self, arm: str) -> State:
        target = load_state(self.pair.aligned(arm))
        examples = self._windows(self.models.skill, "train")[:EXAMPLES]
        return _added(target, masked(self._vector, self._model(target), examples))

    def _transported(self) -> State:
        """In the second model's own coordinates."""
        start, end = (load_state(folder) for folder in (self.pair.anchor, self.pair.model))
        examples = self._windows(self.models.corpus, "train")[:MAPPED]
        return _added(end, transported(self._vector, self._model(start), self._model(end), examples))

    @cached_property
    def _vector(self) -> State:
        """What the skill changed."""
        skilled, anchor = (load_state(x) for x in (self.models.skilled(self.shape, self.seed), self.pair.anchor))
        return {name: skilled[name] - x for name, x in anchor.items()}

    def _model(self, state: State) -> PreTrainedModel:
        return filled(load(self.pair.anchor)[0], state)

    def _abilities(self, state: State) -> Row:
        """Loss and share of right tokens on the skill's held-out text, and loss on the first text's."""
        model = self._model(state)
        skill, right = measured(model, self._windows(self.models.skill, "test"))
        kept, _ = measured(model, self._windows(self.models.corpus, "test"))
        return {"skill_loss": skill, "skill_accuracy": right, "text_loss": kept}

    def _windows(self, corpus: Corpus, part: str) -> Tensor:
        settings = self.models.settings
        return windows(self.models.tokenizer(), corpus.part(part), settings.training.length)[: settings.windows]


def _added(state: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> State:
    return {name: torch.add(x, vector[name]) for name, x in state.items()}
