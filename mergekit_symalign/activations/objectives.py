"""What the loss of a model is: the next token's, a hidden token's, or a label's negative log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_symalign.activations.runner import Batch

IGNORED = -100  # a target that does not count, as transformers marks it


class Objective(str, Enum):
    """What a model predicts."""

    next_token = "next token"
    masked_token = "masked token"
    label = "label"
    token_labels = "label of each token"
    nothing = "nothing"  # the model has no head

    @property
    def needs_labels(self) -> bool:
        return self in (Objective.label, Objective.token_labels)


_BY_ENDING = {
    "ForCausalLM": Objective.next_token,
    "LMHeadModel": Objective.next_token,
    "ForMaskedLM": Objective.masked_token,
    "ForSequenceClassification": Objective.label,
    "ForImageClassification": Objective.label,
    "ForTokenClassification": Objective.token_labels,
}


def objective_of(architecture: str) -> Objective:
    """By the ending of a transformers class name."""
    return next((found for ending, found in _BY_ENDING.items() if architecture.endswith(ending)), Objective.nothing)


def predicts_text(config: Any) -> bool:
    """Whether a model continues a text, by its config: a language model, alone or behind a vision tower."""
    name = next(iter(config.architectures or ()), "")
    writes = objective_of(name) is Objective.next_token or name.endswith("ForConditionalGeneration")
    return writes and not getattr(config, "is_encoder_decoder", False)


@dataclass(frozen=True)
class Samples:
    """Inputs, and what the model should say.

    Attributes:
        batches: of inputs.
        targets: of each batch, int64 [inputs] or [inputs, tokens] with `IGNORED` where nothing is predicted; None
            where nothing is known.
    """

    batches: tuple[Batch, ...]
    targets: tuple[Tensor | None, ...]

    def rows(self, index: int, most: int) -> list[tuple[slice, Batch, Tensor | None]]:
        """A batch in pieces of a few inputs, so that their logits fit in memory.

        Args:
            index: of the batch.
            most: tokens of a piece, padding included; one input may have more.
        """
        batch, targets = self.batches[index], self.targets[index]
        count = max(1, most // batch.valid.shape[1])
        found = []
        for start in range(0, len(batch.valid), count):
            at = slice(start, start + count)
            found.append((at, type(batch)(batch.ids[at], batch.valid[at]), None if targets is None else targets[at]))
        return found


def next_tokens(batch: Batch) -> Tensor:
    """What follows each token, [inputs, tokens]."""
    targets = torch.full_like(batch.ids, IGNORED)
    targets[:, :-1] = torch.where(batch.valid[:, 1:], batch.ids[:, 1:], IGNORED)
    return targets


def logits_of(output: Any) -> Tensor:
    """What a model with a head returns."""
    return output["logits"]  # type: ignore[no-any-return]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over all targets that count."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def drawn(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Targets drawn from the model itself, where some are wanted."""
    probabilities = logits.detach().flatten(0, -2).double().softmax(-1).cpu()
    found = torch.multinomial(probabilities, 1, generator=generator).reshape(targets.shape).to(targets.device)
    return torch.where(targets == IGNORED, IGNORED, found)


def likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    """The targets that the model itself finds likeliest, where some are wanted."""
    return torch.where(targets == IGNORED, IGNORED, logits.detach().argmax(-1))
