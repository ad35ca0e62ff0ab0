"""What a model can do: exact match on held-out problems, loss on held-out text, and how two models differ."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from transformers import LlamaForCausalLM

from .data import END, TASKS, Mixture, encode, problems
from .settings import Settings
from .training import next_token_loss

TEXTS = ("reference", "log")


def abilities(model: LlamaForCausalLM, settings: Settings) -> dict[str, float]:
    """Exact match on every task, nats per character on the texts, and nats per character of the skill's answers."""
    found = {task: exact_match(model, task, settings.problems) for task in TASKS}
    losses = {f"{kind}_loss": loss(model, {kind: 1.0}, settings) for kind in (*TEXTS, "steps")}
    return found | losses


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, task: str, n: int) -> float:
    """The share of problems whose greedy answer is right, from one forward pass.

    A greedy answer is right exactly if every character of it is the most likely one after the right ones before it.
    """
    drawn = problems(task, n, seed=0)
    ids = torch.tensor([encode(END + prompt + answer) for prompt, answer in drawn])
    answer = len(drawn[0][1])
    likeliest = model(ids, use_cache=False).logits.argmax(-1)
    right = likeliest[:, -answer - 1 : -1] == ids[:, -answer:]
    return float(right.all(1).float().mean())


@torch.inference_mode()
def loss(model: LlamaForCausalLM, shares: Mapping[str, float], settings: Settings) -> float:
    """Nats per character on held-out sequences of a mixture, always the same ones."""
    ids, labels = Mixture(shares, settings.length).batch(settings.sequences, random.Random(0), "heldout")
    return float(next_token_loss(model, ids, labels))


@torch.inference_mode()
def deviation(model: LlamaForCausalLM, other: LlamaForCausalLM, settings: Settings) -> float:
    """Largest difference of the logits on held-out sequences of the base mixture, in standard deviations."""
    ids, _ = Mixture(settings.base.shares, settings.length).batch(settings.sequences, random.Random(0), "heldout")
    ours, theirs = (m(ids, use_cache=False).logits for m in (model, other))
    return float((ours - theirs).abs().max() / ours.std())
