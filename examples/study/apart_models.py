"""Part 9: language models of two shapes, each trained from several initialisations until it no longer improves."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .apart_text import Corpus, token_ids, trained_tokenizer, windows
from .settings import HERE

SHAPES: Mapping[str, tuple[type[Any], type[Any]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
AT_ONCE = 16  # windows in one forward pass of a measurement


@dataclass(frozen=True)
class Course:
    """One training with AdamW, in bfloat16 autocast.

    Attributes:
        steps: at most; the learning rate warms up over ``warmup`` of them and falls to a tenth along a cosine.
        batch, length: windows per step, tokens per window.
        check: steps between two losses on the part of the text that stops the training.
        patience: losses in a row without a new best, after which it stops. The best weights are kept.
    """

    steps: int
    batch: int
    length: int
    learning_rate: float
    warmup: int
    check: int
    patience: int

    def rate(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.1 + 0.9 * cosine)


@dataclass(frozen=True)
class Apart:
    """What the models of part 9 depend on (``apart.yml``).

    Attributes:
        seeds: initialisations of each shape.
        vocabulary: tokens; held_out: share of the text to stop by, and share to measure on.
        windows: held-out windows on which losses are measured; prompts: training windows for activations and learning.
        shapes: what the config of each shape has beyond the vocabulary.
        training, skill, version: of the models; of the skill; of another version of a model, on more of the same text.
        learning: options of ``mergekit-symalign learn``.
        older_learning, lineage, lineages: the same options for the arm *another initialisation* of part 2, the name of
            its settings, and how many of its seeds.
        digest: of the text, so that results of two texts are not mixed.
    """

    seeds: tuple[int, ...]
    vocabulary: int
    held_out: float
    windows: int
    prompts: int
    shapes: dict[str, dict[str, Any]]
    training: Course
    skill: Course
    version: Course
    learning: dict[str, Any]
    older_learning: dict[str, Any]
    lineage: str
    lineages: int
    digest: str = ""

    @staticmethod
    def read(name: str = "apart") -> Apart:
        content: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yml").read_text("utf-8"))
        courses = {key: Course(**content[key]) for key in ("training", "skill", "version")}
        return Apart(**content | courses | {"seeds": tuple(content["seeds"])})


@dataclass(frozen=True)
class Models:
    """All models, on disk; each is trained when it is first wanted.

    Attributes:
        corpus: what all models read; skill: what a fine-tune reads too.
    """

    settings: Apart
    corpus: Corpus
    skill: Corpus
    work: Path

    def plain(self, shape: str, seed: int) -> Path:
        return self._kept(f"{shape}-{seed}", lambda: self._taught(new_model(self.settings, shape, seed), seed))

    def skilled(self, shape: str, seed: int) -> Path:
        """A fine-tune of a model on both texts."""
        return self._kept(f"{shape}-{seed}-skilled", lambda: self._skilled(shape, seed))

    def version(self, shape: str, seed: int) -> Path:
        """The model trained on: another version, of the same initialisation."""
        return self._kept(f"{shape}-{seed}-version", lambda: self._version(shape, seed))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return trained_tokenizer([self.corpus.part("train")], self.settings.vocabulary)

    def _taught(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return train(model, self.tokenizer(), self.corpus, self.settings.training, seed)

    def _skilled(self, shape: str, seed: int) -> PreTrainedModel:
        model, tokenizer = load(self.plain(shape, seed))
        return train(model, tokenizer, self.skill, self.settings.skill, seed, beside=self.corpus)

    def _version(self, shape: str, seed: int) -> PreTrainedModel:
        model, tokenizer = load(self.plain(shape, seed))
        return train(model, tokenizer, self.corpus, self.settings.version, 1000 + seed)

    def _kept(self, name: str, make: Callable[[], PreTrainedModel]) -> Path:
        folder = self.work / name
        if not folder.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            save(make(), self.tokenizer(), folder)
        return folder


def new_model(settings: Apart, shape: str, seed: int) -> PreTrainedModel:
    """A freshly initialised model; the seed decides every weight."""
    torch.manual_seed(seed)
    config_class, model_class = SHAPES[shape]
    config = config_class(
        vocab_size=settings.vocabulary,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        **settings.shapes[shape],
    )
    model: PreTrainedModel = model_class(config)
    return model


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model and its tokenizer; the directory appears when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    course: Course,
    seed: int,
    beside: Corpus | None = None,
) -> PreTrainedModel:
    """Train all weights on random windows of a text, and keep those with the lowest loss on its part to stop by.

    Args:
        beside: another text, from which windows are drawn too.
    """
    ids = torch.cat([token_ids(tokenizer, text.part("train")) for text in (corpus, beside) if text is not None])
    held_out = windows(tokenizer, corpus.part("stop"), course.length)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    best, kept, waited = math.inf, copy.deepcopy(model.state_dict()), 0
    for step in range(course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.rate(step)
        starts = torch.randint(len(ids) - course.length, (course.batch,), generator=generator)
        _step(model, optimizer, ids[starts[:, None] + torch.arange(course.length)])
        if (step + 1) % course.check == 0 or step + 1 == course.steps:
            found = loss(model, held_out)
            waited = 0 if found < best else waited + 1
            if found < best:
                best, kept = found, copy.deepcopy(model.state_dict())
            if waited == course.patience:
                break
    model.load_state_dict(kept)
    return model.eval()


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Nats per token of the windows [windows, length]."""
    return measured(model, ids)[0]


@torch.inference_mode()
def measured(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Nats per token of the windows [windows, length], and the share of tokens that are the likeliest."""
    model.eval()
    nats, right = torch.zeros(2, dtype=torch.float64)
    for part in ids.split(AT_ONCE):
        logits = model(part, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        following = part[:, 1:].flatten()
        nats += cross_entropy(logits, following, reduction="sum")
        right += (logits.argmax(1) == following).sum()
    count = ids[:, 1:].numel()
    return float(nats / count), float(right / count)
