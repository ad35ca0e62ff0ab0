"""The parts of a run that measure: one layer alone, whole merges, and where the time goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from gpu import made, one_merge
from gpu.results import CannotRunError, Row, Setting
from gpu.stand_in import routes_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from checkpoints import BASE, LLAMA_1B, LLAMA_8B, LLAMA_70B, SMALL, Recipe, Shape
from shapes import CASES, KINDS, rows_of_layer

from mergekit_symalign.symmetry.solve import align_block

ROOT = Path(__file__).parent.parent.parent
GIB = 2**30
_ROOM = 4.5  # checkpoints that a merge of base and two models needs room for: output, and some to spare
SKILL = Recipe(2, 0.1)
MODELS = {
    "siblings, 10 % noise": (Recipe(1, 0.1), SKILL),
    "the same, one moved": (Recipe(1, 0.1, foreign=True), SKILL),
    "unrelated": (Recipe(11), Recipe(12)),
}


def time_layers(setting: Setting, rows: list[Row]) -> None:
    """Seconds to solve one layer of one model, the second of two runs."""
    shapes = {"small": SMALL} if setting.small else {"1B": LLAMA_1B, "8B": LLAMA_8B, "70B": LLAMA_70B}
    for name, shape in shapes.items():
        for case, recipe in CASES.items():
            if setting.left < 60 and not setting.small:
                rows.append({"shape": name, "model": case, "MLP, s": "no time left"})
                continue
            one = replace(shape, layers=1, vocabulary=64)
            rows.append({"shape": name, "model": case} | layer(one, recipe, setting))


def layer(shape: Shape, recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """Of each block."""
    found: dict[str, Any] = {}
    _reset(setting.device)
    for kind in KINDS:
        sides, of_block = rows_of_layer(shape, recipe, kind, setting.device)
        with routes_of(setting.device):
            found[f"{kind.value}, s"] = min(_seconds(sides, of_block, setting) for _ in range(2))
    return found | {"peak, GiB": _peak(setting.device)}


def _seconds(sides: Any, shape: Any, setting: Setting) -> float:
    from mergekit_symalign.symmetry.options import Symmetries

    one_merge.wait(setting.device)
    start = time.perf_counter()
    align_block(sides, shape, Symmetries())
    one_merge.wait(setting.device)
    return time.perf_counter() - start


def time_merges_1b(setting: Setting, rows: list[Row]) -> None:
    """A plain merge, and aligned ones of models of 1B shape."""
    _time_merges(SMALL if setting.small else LLAMA_1B, setting, rows)


def time_merges_8b(setting: Setting, rows: list[Row]) -> None:
    """The same of 8B shape, with as many layers as there is room for."""
    if setting.small:
        raise CannotRunError("a small run has one shape")
    shape = replace(LLAMA_8B, vocabulary=32000)
    room = shutil.disk_usage(setting.scratch).free / _ROOM
    without = made.size(shape.with_layers(0))
    layers = min(shape.layers, int((room - without) / (made.size(shape.with_layers(1)) - without)))
    if layers < 2:
        raise CannotRunError(f"{setting.scratch} has room for {max(0, layers)} layers")
    rows.append({"models": f"{layers} of {shape.layers} layers"})
    _time_merges(shape.with_layers(layers), setting, rows)


def _time_merges(shape: Shape, setting: Setting, rows: list[Row]) -> None:
    folder = setting.scratch / "timed"
    plain, cost = None, 0.0
    try:
        for number, (name, recipes) in enumerate(MODELS.items()):
            if setting.left < 1.5 * cost and not setting.small:
                rows.append({"models": name, "aligned, s": f"no time left ({setting.left:.0f} s)"})
                continue
            start = time.perf_counter()
            paths = [made.write(folder / _named(r), shape, r, setting.device) for r in (BASE, *recipes)]
            plain = plain or _merge("task_arithmetic", paths, folder, setting)
            aligned = _merge("aligned_task_arithmetic", paths, folder, setting)
            rows.append({"models": name} | _ratios(plain, aligned))
            later = {r for others in list(MODELS.values())[number + 1 :] for r in others}
            for recipe in set(recipes) - later:  # there may be no room for more
                shutil.rmtree(folder / _named(recipe))
            cost = time.perf_counter() - start
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _named(recipe: Recipe) -> str:
    return f"{recipe.seed}-{recipe.noise}-{recipe.foreign}"


def _ratios(plain: dict[str, float], aligned: dict[str, float]) -> dict[str, Any]:
    return {
        "plain, s": plain["seconds"],
        "aligned, s": aligned["seconds"],
        "aligned / plain": aligned["seconds"] / plain["seconds"],
        "solving, s": aligned["solving"],
        "peak plain, GiB": plain["peak"] / GIB,
        "peak aligned, GiB": aligned["peak"] / GIB,
    }


def _merge(method: str, paths: list[Path], folder: Path, setting: Setting) -> dict[str, float]:
    """In a fresh process, unless the run is a small one; the output is removed."""
    base, *models = map(str, paths)
    listed = [{"model": m, "parameters": {"weight": 0.5}} for m in models]
    config = {"merge_method": method, "base_model": base, "models": listed, "dtype": "bfloat16"}
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump(config), "utf-8")
    options = {"device": str(setting.device)} if setting.device.type == "cuda" else {}
    if setting.small:
        found = one_merge.main(file, folder / "out", options)
        shutil.rmtree(folder / "out")
        return found
    one_merge.release(setting.device)
    command = [sys.executable, "-m", one_merge.__name__, str(file), str(folder / "out"), json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(10, setting.left))
    shutil.rmtree(folder / "out", ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"the merge failed:\n{done.stderr[-2000:]}")
    last: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return last


def profile_layer(setting: Setting, rows: list[Row]) -> None:
    """The operators that take the most time of the device in a layer of a sibling and of an unrelated model."""
    from torch.profiler import ProfilerActivity, profile

    from mergekit_symalign.symmetry.options import Symmetries

    cuda = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for case in ("sibling, 10 % noise", "unrelated")[: 1 if setting.small else None]:
        for kind in KINDS:
            shape = replace(SMALL if setting.small else LLAMA_8B, layers=1, vocabulary=64)
            sides, of_block = rows_of_layer(shape, CASES[case], kind, setting.device)
            with routes_of(setting.device), profile(activities=activities) as profiler:
                align_block(sides, of_block, Symmetries())
                one_merge.wait(setting.device)
            averages = profiler.key_averages()
            spent = {x.key: x.self_device_time_total if cuda else x.self_cpu_time_total for x in averages}
            total = sum(spent.values())
            for x in sorted(averages, key=lambda x: -spent[x.key])[:5]:
                row = {"block": f"{case}: {kind.value}", "operator": x.key, "calls": x.count}
                share = f"{spent[x.key] / max(total, 1e-9):.0%}"
                rows.append(row | {"ms": spent[x.key] / 1e3, "share": share})


def _reset(device: torch.device) -> None:
    one_merge.release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
