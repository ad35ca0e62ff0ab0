"""The small Llama of the study, on disk with a tokenizer of single characters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import ALPHABET, END, IDS
from .settings import Settings

State = dict[str, Tensor]
WEIGHTS = "model.safetensors"


def new_model(settings: Settings, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; the seed decides every weight."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=IDS[END],
        eos_token_id=IDS[END],
        attn_implementation="eager",  # faster than the fused kernel on sequences this short
        **settings.model,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    """Write a model and its tokenizer; the directory appears when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer().save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def load_state(folder: Path) -> State:
    """All tensors of a checkpoint that fits into one file."""
    return load_file(folder / WEIGHTS)


def with_state(settings: Settings, state: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """A model with these weights, ready for evaluation."""
    model = new_model(settings, 0)
    model.load_state_dict(dict(state))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of the alphabet, for the prompts that MergeKit reads in activation matching."""
    core = Tokenizer(WordLevel(vocab=dict(IDS), unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END, pad_token=END)
