"""Stand-in for the `tests/common.py` that MergeKit's source distribution leaves out.

Written from how MergeKit's own tests call it: four makers of tiny random checkpoints, and one function that
runs a merge and checks what it wrote.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mergekit.architecture import ModelArchitecture, arch_info_for_config, get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

LLAMA_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_picollama(path: Path | str, vocab_size: int = 64) -> str:
    """Write a random two-layer Llama with an untied head, in float32, and return its path."""
    return _save_random(LlamaForCausalLM, LlamaConfig(vocab_size=vocab_size, **LLAMA_SIZE), path)


def make_picogranite(path: Path | str, vocab_size: int = 64) -> str:
    """Write a random two-layer Granite and return its path."""
    return _save_random(GraniteForCausalLM, GraniteConfig(vocab_size=vocab_size, **LLAMA_SIZE), path)


def make_gpt2size(path: Path | str, vocab_size: int = 64) -> str:
    """Write a random GPT-2 with the twelve layers of the original, but narrow, and return its path."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=12, n_head=4)
    return _save_random(GPT2LMHeadModel, config, path)


def make_picoLlaVa(path: Path | str, vocab_size: int = 64) -> str:  # noqa: N802 (the name MergeKit's tests import)
    """Write a random LLaVA, a tiny CLIP tower before a tiny Llama, and return its path.

    MergeKit has no table for this architecture: it is the one its tests merge by inference.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(vocab_size=vocab_size, **LLAMA_SIZE)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab_size - 1)
    return _save_random(LlavaForConditionalGeneration, config, path)


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge into a temporary directory; check that every weight was written, finite and in `out_dtype`.

    `dtype` alone promises nothing about the output: some methods return float32 for bfloat16 inputs.

    Args:
        config: the merge to run.
        validate: further checks, given the path of the merged model.
        auto_arch: whether MergeKit is expected to infer the architecture rather than find it in its tables.

    Raises:
        AssertionError: if the architecture came from elsewhere, or what was written is not as above.
    """
    options = MergeOptions(quiet=True)
    architecture = get_architecture_info(config, options)
    with TemporaryDirectory() as directory:
        run_merge(config, directory, options)
        merged_config = AutoConfig.from_pretrained(directory)
        assert (arch_info_for_config(merged_config) is None) == auto_arch
        _check_weights(directory, architecture, merged_config, config.out_dtype)
        if validate is not None:
            validate(directory)


def _check_weights(path: str, architecture: ModelArchitecture, config: PretrainedConfig, dtype: str | None) -> None:
    loader = LazyTensorLoader.from_disk(path)
    written = set(loader.index.tensor_paths)
    weights = architecture.all_weights(config)
    missing = {weight.name for weight in weights if not weight.optional} - written
    unknown = written - {weight.name for weight in weights}
    assert not missing, f"missing from the merged model: {sorted(missing)}"
    assert not unknown, f"not of this architecture: {sorted(unknown)}"
    for name in written:
        tensor = loader.get_tensor(name)
        assert tensor.isfinite().all(), f"{name} is not finite"
        assert dtype in (None, str(tensor.dtype).removeprefix("torch.")), f"{name} is {tensor.dtype}"


def _save_random(architecture: type[PreTrainedModel], config: PretrainedConfig, path: Path | str) -> str:
    """Initialise the architecture from a seed that the directory's name fixes: runs repeat, models differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(Path(path).name.encode()))
        architecture(config).save_pretrained(path)
    return str(path)
