"""Part 9: a text in three parts, and a tokenizer that is trained on the first of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Part = Literal["train", "stop", "test"]
END = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """A text, cut at two places.

    Attributes:
        held_out: share of the text in each of the last two parts: one to stop the training by, one to measure on.
    """

    text: str
    held_out: float

    @staticmethod
    def read(path: Path, held_out: float) -> Corpus:
        return Corpus(path.read_text("utf-8"), held_out)

    @property
    def digest(self) -> str:
        """What identifies the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def part(self, name: Part) -> str:
        held_out = round(len(self.text) * self.held_out)
        ends = {"train": (0, -2 * held_out), "stop": (-2 * held_out, -held_out), "test": (-held_out, None)}
        return self.text[slice(*ends[name])]


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Pairs of bytes that occur together (BPE), as transformers loads it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END)


def windows(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> Tensor:
    """All the text as ids [windows, length], without what does not fill a window."""
    ids = token_ids(tokenizer, text)
    return ids[: len(ids) // length * length].view(-1, length)


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])
