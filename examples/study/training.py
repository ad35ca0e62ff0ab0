"""Training, with snapshots from which a branch can go on exactly, or with its data in another order."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from .data import IGNORED, Mixture
from .settings import Lesson, Settings

Snapshot = dict[str, Any]  # "step", "model", "optimizer"


@dataclass(frozen=True)
class Trainer:
    """One lesson, with AdamW in bfloat16 autocast (weights stay in float32).

    Attributes:
        order: names the order of the data; the same name gives the same batches.
    """

    settings: Settings
    lesson: Lesson
    order: str

    def train(
        self, model: LlamaForCausalLM, start: Snapshot | None = None, keep: Collection[int] = ()
    ) -> dict[int, Snapshot]:
        """Train ``model`` in place, from the start of the lesson or from a snapshot of it.

        Args:
            start: model, optimizer and step to go on from.
            keep: steps before which a snapshot is taken.

        Returns:
            The snapshots by step.
        """
        rate = self.lesson.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        first = 0
        if start is not None:
            model.load_state_dict(start["model"])
            optimizer.load_state_dict(start["optimizer"])
            first = start["step"]
        mixture = Mixture(self.lesson.shares, self.settings.length)
        generator = random.Random(self.order)
        kept: dict[int, Snapshot] = {}
        model.train()
        for step in range(first, self.lesson.steps):
            if step in keep:
                kept[step] = _snapshot(step, model, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self._rate(step)
            _step(model, optimizer, *mixture.batch(self.settings.batch, generator))
        model.eval()
        return kept

    def _rate(self, step: int) -> float:
        lesson = self.lesson
        cosine = 0.5 * (1 + math.cos(math.pi * step / lesson.steps))
        return lesson.learning_rate * min(1.0, (step + 1) / lesson.warmup) * (0.1 + 0.9 * cosine)


def next_token_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled characters, nats; ids and labels are [sequences, length]."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, ids, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _snapshot(step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Snapshot:
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    state = optimizer.state_dict()
    moments = {i: {key: x.clone() for key, x in entry.items()} for i, entry in state["state"].items()}
    return {"step": step, "model": weights, "optimizer": {"state": moments, "param_groups": state["param_groups"]}}
