"""What `mergekit-symalign measure` costs: time next to a plain forward pass, and peak memory against depth.

    python tests/benchmarks/statistics_cost.py [--runs 3] [--tokens 4096] [--layers 4 8 16]

Time: SmolLM2-135M on the package's prompts, in this process, one after the other: medians, and the median of ratios.
Memory: random models of one width and several depths, each run a command of its own. Anonymous memory is what the
process allocates itself: pages of the mapped checkpoint do not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from depth import BIN, write_model, write_prompts
from measure import watch
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_symalign.activations.defaults import DEFAULT_PROMPTS
from mergekit_symalign.activations.inputs import find_inputs
from mergekit_symalign.activations.objectives import Objective
from mergekit_symalign.activations.samples import How, prepare_texts
from mergekit_symalign.activations.stream import sum_inputs
from mergekit_symalign.commands.models import StoredModel, use_cache_of
from mergekit_symalign.demo.source import unpack_smollm2


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def times(folder: Path, tokens: int, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of plain forward passes, and of those that sum up Gram matrices and the loss, on the same prompts."""
    options = MergeOptions(quiet=True)
    use_cache_of(options)
    stored = StoredModel.open(str(folder), options, "sdpa")
    how = How(tokens, 512, Objective.next_token, {}, False, 0)
    samples = prepare_texts(DEFAULT_PROMPTS, AutoTokenizer.from_pretrained(folder), how).samples
    inputs = find_inputs(stored, samples.batches[0])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def forward() -> None:
        for batch in samples.batches:
            whole(**batch.inputs())

    def measured() -> None:
        sum_inputs(stored, samples, inputs, full=True, put=lambda gram: None, step=lambda: None)

    forward(), measured()  # warm
    pairs = [(timed(forward), timed(measured)) for _ in range(runs)]
    return [p for p, _ in pairs], [m for _, m in pairs]


def peak(folder: Path, *options: str) -> float:
    """Peak of anonymous memory of a measurement, in MiB."""
    out = folder / "statistics.safetensors"
    command = [BIN / "mergekit-symalign", "measure", folder / "model", "-o", out, "--quiet", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w", encoding="utf-8") as log:
        prompts = ["--calibration", folder / "prompts.txt", *options]
        process = subprocess.Popen([*command, *prompts], stdout=log, stderr=log, env=environment)
        _, own = watch(process)
    if process.returncode:
        sys.exit((folder / "log").read_text("utf-8"))
    return own / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plain, gram = times(unpack_smollm2(Path(name) / "smollm2"), args.tokens, args.runs)
    ratio = median(g / p for p, g in zip(plain, gram, strict=True))
    print(f"SmolLM2-135M, {args.tokens} tokens, {torch.get_num_threads()} threads, medians of {args.runs}:")
    print(f"forward pass {median(plain):.1f} s, with Gram matrices and loss {median(gram):.1f} s, ratio {ratio:.2f}\n")
    print("| layers | model in float32 | Gram matrices | Fisher information |\n|---:|---:|---:|---:|")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            layer = write_model(folder / "model", layers, 0)
            write_prompts(folder / "prompts.txt", 1024)
            found = peak(folder), peak(folder, "--gram", "none", "--fisher", "empirical")
        cells = " | ".join(f"{x:.0f} MiB" for x in (layers * layer / 2**20, *found))
        print(f"| {layers} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
