"""The models of part 8: all-MiniLM-L6-v2 fine-tuned on one classification task each, and their losses.

Each task has a head of its own (one linear layer), which no merge touches in the end: a merged encoder is measured on
each task with the head of that task's own model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from ..fusion import pretrained
from ..models import State, load_state
from ..store import Row
from .language import WARMUP
from .saving import saved
from .settings import Skills
from .tasks import CLASSES, TASKS, Example, by_class

HEAD = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True)
class Encoders:
    """Trains, loads and measures on one device."""

    settings: Skills
    work: Path
    device: str
    labelled: bool = True

    def base(self) -> Path:
        """The pretrained encoder with a head that nothing has trained, the same for all."""
        torch.manual_seed(0)
        return self._saved(self.work / "base", self._fresh)

    def folder(self, kind: str, seed: int) -> Path:
        return self.work / f"{kind}-{seed}"

    def train(self, kind: str, seed: int) -> Path:
        return self._saved(self.folder(kind, seed), lambda: self._tuned(kind, seed))

    def calibration(self, kind: str, n: int, seed: int) -> list[dict[str, Any]]:
        examples = TASKS[kind]("train")
        return [example._asdict() for example in random.Random(seed).sample(examples, n)]

    def losses(self, state: State, seed: int) -> Row:
        """For each task the loss in nats, and the share of held-out examples that are told right."""
        found: Row = {}
        for kind in self.settings.kinds:
            head = load_state(self.train(kind, seed))
            model = _evaluator(self.base(), self.device)
            model.load_state_dict({**state, **{name: head[name] for name in HEAD}}, strict=False)
            found |= self._abilities(model, kind)
        return found

    def _fresh(self) -> BertForSequenceClassification:
        return BertForSequenceClassification.from_pretrained(
            pretrained(), num_labels=CLASSES, attn_implementation="eager"
        )

    def _tuned(self, kind: str, seed: int) -> BertForSequenceClassification:
        torch.manual_seed(seed)  # dropout
        model = BertForSequenceClassification.from_pretrained(self.base(), attn_implementation="eager").to(self.device)
        _fine_tune(model, _tokenizer(), by_class(TASKS[kind]("train")), self.settings, seed)
        return model

    def _saved(self, folder: Path, made: Callable[[], BertForSequenceClassification]) -> Path:
        return saved(
            folder, lambda unfinished: (made().save_pretrained(unfinished), _tokenizer().save_pretrained(unfinished))
        )

    @torch.inference_mode()
    def _abilities(self, model: BertForSequenceClassification, kind: str) -> Row:
        everything = TASKS[kind]("heldout")
        examples = random.Random(1).sample(everything, min(self.settings.heldout, len(everything)))
        logits, labels = _run(model, _tokenizer(), examples, self.settings.tokens)
        right = (logits.argmax(1) == labels).float().mean()
        return {f"{kind}_loss": float(cross_entropy(logits, labels)), kind: float(right)}


@cache
def _evaluator(base: Path, device: str) -> BertForSequenceClassification:
    """One model for each process: its weights are replaced, not its directory read again."""
    return BertForSequenceClassification.from_pretrained(base, attn_implementation="eager").to(device).eval()


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pretrained())


def _fine_tune(
    model: BertForSequenceClassification, tokenizer: Any, classes: list[list[Example]], settings: Skills, seed: int
) -> None:
    """Train all weights with AdamW; each class is drawn as often as any other."""
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / WARMUP)
        batch = [generator.choice(generator.choice(classes)) for _ in range(settings.batch)]
        with torch.autocast(model.device.type, torch.bfloat16):
            logits, labels = _run(model, tokenizer, batch, settings.tokens)
        cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _run(
    model: BertForSequenceClassification, tokenizer: Any, examples: Sequence[Example], tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [examples, classes] and labels."""
    batch = tokenizer(
        [example.text for example in examples], padding=True, truncation=True, max_length=tokens, return_tensors="pt"
    ).to(model.device)
    return model(**batch).logits, torch.tensor([example.label for example in examples], device=model.device)
