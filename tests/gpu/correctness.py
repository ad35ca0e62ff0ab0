"""The parts of a run that compare a device with the CPU: kernels, transfers, and whole merges."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from conftest import State, merge_config, merged
from models import make_model, perturbed, save, with_weights
from torch import Tensor

from gpu.actions import actions
from gpu.agreement import DTYPES, deviation
from gpu.blocks import ROPE, Block, attention_blocks, neurons
from gpu.results import Row, Setting
from gpu.solvers import Kernel, solvers
from gpu.stand_in import routes_of
from gpu.transfers import Transfers, transfers
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.options import MlpShape
from mergekit_symalign.symmetry.solve import solve_block

MERGES: dict[str, dict[str, Any]] = {
    "--cuda": {},
    "--cuda --low-cpu-memory": {"low_cpu_memory": True},
    "--cuda --read-to-gpu": {"read_to_gpu": True},
    "--multi-gpu": {"multi_gpu": True},
}
_SAME = 1e-4  # of a tensor's largest number: merged numbers that rounding may move apart


def check_solvers(setting: Setting, rows: list[Row]) -> None:
    """Every solver in both dtypes."""
    _check(solvers(), setting, rows)


def check_actions(setting: Setting, rows: list[Row]) -> None:
    """Every kind of element in both dtypes."""
    _check(actions(), setting, rows)


def _check(kernels: Mapping[str, Kernel], setting: Setting, rows: list[Row]) -> None:
    wrong = []
    for dtype in DTYPES[: 1 if setting.small else None]:
        largest = 0.0
        for name, kernel in kernels.items():
            try:
                largest = max(largest, deviation(kernel, setting.device, dtype))
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{name}, {dtype}: {error}")
        rows.append({"dtype": str(dtype), "kernels": len(kernels), "failed": len(wrong), "largest deviation": largest})
    assert not wrong, "\n".join(wrong)


def check_transfers(setting: Setting, rows: list[Row]) -> None:
    """How often the CPU waits for the device, and how many steps it starts; neither may grow with heads or neurons."""
    names = ("attention, sibling", "MLP, sibling", "attention, unrelated", "MLP, unrelated")
    for name in names[: 2 if setting.small else None]:
        few, many = (block_transfers(setting.device, name, twice) for twice in (False, True))
        rows.append({"block": name, **{key: f"{a} → {many.as_dict()[key]}" for key, a in few.as_dict().items()}})
        if "sibling" in name:
            assert many.waits <= few.waits + 8, f"{name}: twice the size waits {many.waits} times, not {few.waits}"


def block_transfers(device: torch.device, name: str, twice: bool) -> Transfers:
    """Of one block of a small size, or of twice as many heads or neurons."""
    related = "unrelated" not in name
    if name.startswith("MLP"):
        shape = MlpShape(1200 if twice else 600)
        block = Block(name, neurons(shape, related=related, hidden=256), shape)
    else:
        heads = replace(ROPE, query_heads=16, kv_heads=8) if twice else ROPE
        block = next(b for b in attention_blocks({"of": heads}) if b.name == f"of, {name.split(', ')[1]}")

    def work(there: Any) -> object:
        sides = {axis: [(there(a.float()), there(b.float())) for a, b in x] for axis, x in block.sides.items()}
        return solve_block(sides, block.shape, block.use)

    with routes_of(device):
        return transfers(work, device)


def check_merges(setting: Setting, rows: list[Row]) -> None:
    """`aligned_task_arithmetic` with every option that moves work to the device, and what the CPU merges."""
    folder = setting.scratch / "merges"
    model = make_model("llama", 0)
    layout = resolve(model.config, model="gpu")
    twin = with_weights(model, transform(perturbed(model, 0.1, 1).state_dict(), layout, random_elements(layout, 3)))
    models = {"base": model, "twin": twin, "sibling": perturbed(model, 0.1, 2)}
    paths = {name: save(m, folder / name) for name, m in models.items()}
    config = merge_config("aligned_task_arithmetic", paths["base"], [paths["twin"], paths["sibling"]])
    config["parameters"] = {"weight": 0.5}
    expected = merged(config, folder / "cpu")
    cuda = setting.device.type == "cuda"
    for name, options in MERGES.items() if cuda else {"on the CPU, by a device's routes": {}}.items():
        with routes_of(setting.device):
            found = merged(config, folder / "out", **({"device": "cuda"} if cuda else {}), **options)
        off = largest_difference(expected, found)
        rows.append({"options": name, "largest deviation": off})
        shutil.rmtree(folder / "out")
        assert off <= _SAME, f"{name}: the merge is off by {off:.1e}"
    shutil.rmtree(folder)


def largest_difference(one: State, other: State) -> float:
    """Of any number, as a share of the largest of its tensor."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30))

    return max(apart(x, other[name]) for name, x in one.items())
