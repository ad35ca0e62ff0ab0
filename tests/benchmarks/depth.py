"""Peak memory of a solve by activations, for models of one width and several depths (docs/activations.md).

    python tests/benchmarks/depth.py

A random Llama and a sibling of it in bfloat16, a layer of each 24 MiB in float32; each solve in a process of its own.
Anonymous memory is what the process allocates itself: pages of the mapped input files do not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import watch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BIN = Path(sys.executable).parent
WORDS = 1000


def write_model(folder: Path, layers: int, seed: int) -> int:
    """A random model or (seed not 0) a sibling of it, and a tokenizer of words; returns a layer's bytes in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=4, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * (seed > 0) * parameter.std() * torch.randn(parameter.shape))
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.model.layers[0].parameters())


def write_prompts(path: Path, tokens: int, length: int = 128) -> None:
    words = torch.randint(1, WORDS, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    path.write_text("\n".join(" ".join(f"w{i}" for i in row) for row in words.tolist()), "utf-8")


def peaks(folder: Path, *options: str) -> tuple[float, float]:
    """Peaks of all resident and of anonymous memory of a solve, in MiB."""
    command = [BIN / "mergekit-symalign", "solve", folder / "anchor", folder / "model", "-o", folder / "a.safetensors"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen([*command, "--quiet", *options], stdout=log, stderr=log, env=environment)
        resident, own = watch(process)
    if process.returncode:
        sys.exit((folder / "log").read_text("utf-8"))
    return resident / 2**20, own / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    print("| layers | both models in float32 | peak of anonymous memory | peak resident |")
    print("|---:|---:|---:|---:|")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            layer = max(write_model(folder / side, layers, seed) for seed, side in enumerate(("anchor", "model")))
            write_prompts(folder / "prompts.txt", args.tokens)
            options = ("--objective", "activations", "--calibration", str(folder / "prompts.txt"))
            resident, own = peaks(folder, *options)
        print(f"| {layers} | {2 * layers * layer / 2**20:.0f} MiB | {own:.0f} MiB | {resident:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
