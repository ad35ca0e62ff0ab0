"""Alignment by activations: what streams is what the whole model computes, and planted twins are recovered."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import State, load, merge_config, merged
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import (
    FAMILIES,
    EverythingInFloat64,
    make_model,
    off_by,
    perturbed,
    rounding,
    save,
    with_weights,
    word_tokenizer,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mergekit_symalign.activations import calibration as calibration_module
from mergekit_symalign.activations.calibration import Calibration
from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.activations.statistics import Statistics, Stream, run_layer
from mergekit_symalign.commands.solve import run_solve
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph import readers
from mergekit_symalign.graph.activations import RunLayer
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.by_activations import evidence
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.neurons import align_mlp_by
from mergekit_symalign.symmetry.options import MlpShape, Symmetries

RUNNABLE = [family for family in FAMILIES if not family.startswith("vit")]  # which reads no text
TOKENS, LENGTH = 2048, 24
ALL_AXES = frozenset(("query", "key", "value", "attended", "down"))


def prompts(path: Path, vocabulary: int = 97, tokens: int = TOKENS, seed: int = 0) -> Path:
    """A .jsonl file of random words, prompts of 5 to 24 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    while tokens > 0:
        length = int(torch.randint(5, LENGTH + 1, (1,), generator=generator))
        words = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in words)}))
        tokens -= length
    path.write_text("\n".join(lines), "utf-8")
    return path


EPS = torch.finfo(torch.float32).eps
NOISE = 0.02  # of a sibling's weights, relative


def _turned_by_rounding(model: PreTrainedModel) -> float:
    """How far weights may be off, relative to their size, that were matched by activations in float32.

    These carry the rounding of a run, and each coordinate of a head turns by as much.
    """
    return rounding(model) * resolve(model.config, model="m").geometry.head_dim ** 0.5


class Twins:
    """An anchor, a planted twin of it, a sibling, and a planted twin of that, saved in float32 with tokenizers."""

    def __init__(self, family: str, folder: Path) -> None:
        self.anchor = make_model(family, 0)
        self.sibling = perturbed(self.anchor, NOISE, 1)
        layout = resolve(self.anchor.config, model=family)
        elements = random_elements(layout, 3, Planted())
        self.paths = {}
        states = {"anchor": self.anchor.state_dict(), "sibling": self.sibling.state_dict()}
        states |= {f"{name}-twin": transform(state, layout, elements) for name, state in states.items()}
        for name, state in states.items():
            self.paths[name] = save(with_weights(self.anchor, state), folder / name)
            word_tokenizer(97).save_pretrained(folder / name)
        self.prompts = prompts(folder / "prompts.jsonl")

    def loaded(self, path: Path) -> State:
        """A checkpoint as transformers loads it, whatever its tensors are called."""
        return dict(type(self.anchor).from_pretrained(path, dtype=torch.float32).state_dict())

    def match(self, model: str, out: Path, **parameters: Any) -> State:
        settings = {"objective": "activations", "calibration": str(self.prompts)} | parameters
        config = merge_config("rotation_match", self.paths["anchor"], [self.paths[model]], parameters=settings)
        return merged(config, out)


@pytest.fixture(autouse=True)
def _tokenizers_as_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some model types transformers puts a class of its own around any tokenizer file, and reads no words."""
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)


@pytest.fixture(scope="module", params=RUNNABLE)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins("llama", tmp_path_factory.mktemp("llama"))


def test_a_twin_is_recovered_from_activations_alone(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "GRAIN", 1e-9)  # enough for neurons that no prompt wakes
    monkeypatch.setattr(evidence.Agreement, "share", 1e-9)
    twins.match("anchor-twin", tmp_path)
    out, anchor, planted = (twins.loaded(p) for p in (tmp_path, twins.paths["anchor"], twins.paths["anchor-twin"]))
    assert off_by(out, anchor) * EPS < _turned_by_rounding(twins.anchor)
    assert sum(not torch.allclose(planted[name], x, atol=0.1) for name, x in anchor.items()) > len(anchor) / 3


@pytest.mark.parametrize("family", ["llama", "mixtral", "deberta-v2"])
def test_a_twin_aligns_to_the_same_weights_as_the_original(family: str, tmp_path: Path) -> None:
    twins = Twins(family, tmp_path)
    out = []
    for name in ("sibling", "sibling-twin"):
        twins.match(name, tmp_path / f"{name}-out")
        out.append(twins.loaded(tmp_path / f"{name}-out"))
    assert off_by(out[1], out[0]) * EPS < 2 * _turned_by_rounding(twins.anchor)  # either of them


# Windows, QK-norms, fused, Conv1D, relative positions by their own projections and by those of the tokens.
STREAMED = ["mistral", "gemma3", "qwen3", "olmo2", "cohere2", "phi4-mini", "gpt2", "deberta-v2", "deberta-v3"]
# Where the activations are in the modules of transformers, written down once more, without the family files.
OUTPUTS = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "qkv_proj": ("query", "key", "value"),
    "c_attn": ("query", "key", "value"),
    "query_proj": ("query",),
    "key_proj": ("key",),
    "value_proj": ("value",),
    "pos_query_proj": ("query",),
    "pos_key_proj": ("key",),
}
INPUTS = {"o_proj": "attended", "down_proj": "down", "attn.c_proj": "attended", "mlp.c_proj": "down"}
INPUTS |= {"attention.output.dense": "attended"} | {f"{layer}.output.dense": "down" for layer in range(3)}


@contextmanager
def _hooked(model: PreTrainedModel) -> Iterator[dict[tuple[int, str], list[torch.Tensor]]]:
    """Inside, what every forward writes and reads, by layer and axis, in the order of the calls."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        path = name.split(".")
        layer = next((int(part) for part in path if part.isdigit()), -1)
        reads = next((INPUTS[end] for n in (1, 2, 3) if (end := ".".join(path[-n:])) in INPUTS), None)
        writes = OUTPUTS.get(path[-1], ())

        def output(m: Any, args: Any, out: torch.Tensor, axes: Any = writes, layer: int = layer) -> None:
            heads = model.config.num_attention_heads
            kv = getattr(model.config, "num_key_value_heads", heads) if model.config.model_type != "gpt2" else heads
            d = out.shape[-1] // (heads + 2 * kv)
            sizes = [heads * d, kv * d, kv * d] if len(axes) > 1 else [out.shape[-1]]
            for axis, x in zip(axes, out.split(sizes, -1), strict=True):
                seen[layer, axis].append(x[0])

        def read(m: Any, args: Any, axis: Any = reads, layer: int = layer) -> None:
            seen[layer, axis].append(args[0][0])

        if writes:
            handles.append(module.register_forward_hook(output))
        if reads:
            handles.append(module.register_forward_pre_hook(read))
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _reference(anchor: PreTrainedModel, model: PreTrainedModel, calibration: Calibration) -> dict[Any, list[Any]]:
    """Products of plain forwards of the whole models, one prompt at a time, so without any padding."""
    sums: dict[Any, list[Any]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for number, sequence in enumerate(calibration.sequences):
        ids, seen = torch.tensor([sequence]), []
        for each in (anchor, model):
            with _hooked(each) as found:
                each(ids)
            seen.append(found)
        for key, calls in seen[0].items():
            both = list(zip(calls, seen[1][key], strict=True))
            for a, b in both if number == 0 else both[:1]:  # relative positions, behind the tokens, count once
                for i, product in enumerate((a.mT @ b, a.square().sum(0), b.square().sum(0))):
                    sums[key][i] = sums[key][i] + product
    return sums


def _streamed(
    models: list[PreTrainedModel], calibration: Calibration, axes: frozenset[str] = ALL_AXES
) -> list[Statistics]:
    """Of each layer."""
    runners = [LayerRunner(m.config, resolve(m.config, model="m")) for m in models]
    batches = list(calibration.batches())
    recorded, hidden = [], []
    for runner, model in zip(runners, models, strict=True):
        outside = {name: x for name, x in model.state_dict().items() if name in runner.layout.outside}
        recorded.append([runner.record(batch, outside) for batch in batches])
        hidden.append([r.hidden for r in recorded[-1]])
    found = []
    for layer in range(runners[0].layout.layers):
        streams = []
        for runner, model, h, r in zip(runners, models, hidden, recorded, strict=True):
            state = model.state_dict()
            names = {part: runner.layout.name(layer, part) for part in runner.layout.inside}
            weights = {part: state[name] for part, name in names.items() if name in state}
            streams.append(Stream(runner, weights, h, r, axes if model is models[1] else frozenset()))
        hidden, sums = run_layer(layer, streams[0], streams[1:], list(calibration.kept()))
        found.append(sums[0])
    return found


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_statistics_are_those_of_the_whole_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "BATCH_TOKENS", 200)
    anchor = make_model(family, 0, attn_implementation="eager")
    model = perturbed(anchor, 0.1, 1)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LENGTH + 1, (40,), generator=generator).tolist()
    calibration = Calibration(tuple(tuple(torch.randint(1, 97, (n,), generator=generator).tolist()) for n in lengths))
    assert len(list(calibration.batches())) > 1
    with EverythingInFloat64():
        expected, streamed = _reference(anchor, model, calibration), _streamed([anchor, model], calibration)
    found = {(i, axis): c for i, layer in enumerate(streamed) for axis, c in layer.covariances.items()}
    assert found.keys() == expected.keys()
    assert len(found) == 5 * anchor.config.num_hidden_layers
    for key, sums in expected.items():
        for wanted, got in zip(sums, (found[key].cross, found[key].anchor, found[key].model), strict=True):
            assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max(), key


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe"])
def test_streamed_routing_is_that_of_the_whole_model(family: str) -> None:
    """Prompts of one length, in one batch, so that plain forwards give the tokens in the same order."""
    anchor = make_model(family, 0, attn_implementation="eager")
    models = [anchor, perturbed(anchor, 0.1, 1)]
    ids = torch.randint(1, 97, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    with EverythingInFloat64(), torch.no_grad():
        streamed = _streamed(models, Calibration(tuple(map(tuple, ids.tolist()))), frozenset(("expert",)))
        for side, model in enumerate(models):
            given: list[Any] = []
            for layer in model.model.layers:
                layer.mlp.experts.register_forward_pre_hook(lambda m, args, given=given: given.append(args))
            model(ids)
            for layer, (entered, chosen, _) in zip(streamed, given, strict=True):
                assert layer.routing is not None
                found = layer.routing[side]
                torch.testing.assert_close(found.entered, entered, rtol=0, atol=1e-6 * float(entered.abs().max()))
                reached = torch.nn.functional.one_hot(chosen, found.logits.shape[1]).sum(1).bool()
                assert torch.equal(found.reached, reached)
                assert torch.equal(found.logits.topk(chosen.shape[1]).indices.sort().values, chosen.sort().values)


def test_directions_without_evidence_are_left_where_weights_put_them(llama: Twins, tmp_path: Path) -> None:
    """One token says nothing about most directions of a head: the grain of weights finds the twin's rotations."""
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "w9"}', "utf-8")
    out = llama.match("anchor-twin", tmp_path / "out", calibration=str(one), permutation=False)
    anchor, planted = load(llama.paths["anchor"]), load(llama.paths["anchor-twin"])
    for name in (n for n in anchor if "v_proj" in n or "o_proj" in n):
        assert (out[name] - anchor[name]).norm() <= 1e-2 * anchor[name].norm(), name
        assert (planted[name] - anchor[name]).norm() > anchor[name].norm(), name


def test_silent_neurons_are_matched_by_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    hidden[5:9] = 0
    rows = {axis: torch.randn(12, 7, generator=generator, dtype=torch.float64) for axis in ("gate", "up", "down")}
    order = torch.randperm(12, generator=generator)
    sides = {axis: [(x, x[order])] for axis, x in rows.items()}
    seen = Covariance.of_rows([(hidden, hidden[order])])
    for scale in (False, True):
        element = align_mlp_by(seen, sides, MlpShape(12), Symmetries(neuron_scaling=scale)).element
        for axis, x in rows.items():
            torch.testing.assert_close(element.actions[axis](x[order], 0), x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_signed_neuron_scales_are_undone_by_activations(family: str, tmp_path: Path) -> None:
    anchor = make_model(family, 0)
    layout = resolve(anchor.config, model="m")
    twin = transform(anchor.state_dict(), layout, random_elements(layout, 2, Planted(neuron_scaling=True)))
    states = [anchor.state_dict(), twin]
    paths = [save(with_weights(anchor, state), tmp_path / str(i)) for i, state in enumerate(states)]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    settings = {"objective": "activations", "calibration": str(prompts(tmp_path / "p.jsonl")), "neuron_scaling": True}
    merged(merge_config("rotation_match", paths[0], [paths[1]], parameters=settings), tmp_path / "out")
    out = type(anchor).from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert off_by(out, anchor.state_dict()) * EPS < _turned_by_rounding(anchor)


_KILLED_IN_LAYER_2 = """
import os
from mergekit.scripts.run_yaml import main
from mergekit_symalign.graph.activations import RunLayer
execute = RunLayer.execute
def killed(self, **given):
    if self.layer == 2:
        os._exit(99)
    return execute(self, **given)
RunLayer.execute = killed
main()
"""


def test_a_killed_run_started_again_the_file_and_an_undisturbed_run_agree(
    llama: Twins, tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """It ends at once in the third layer, shards of the first are written; then mergekit-yaml into the same folders."""
    saved, paths = tmp_path / "saved", llama.paths
    settings = {"objective": "activations", "calibration": str(llama.prompts), "save_alignment": str(saved)}
    config = merge_config("aligned_task_arithmetic", paths["anchor"], [paths["sibling-twin"]], parameters=settings)
    config["parameters"]["weight"] = 1.0
    out, file = tmp_path / "out", tmp_path / "killed.yml"
    file.write_text(yaml.safe_dump(config), "utf-8")
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--out-shard-size", "50000"]
    killed = subprocess.run([sys.executable, "-c", _KILLED_IN_LAYER_2, file, out, *options], capture_output=True)
    assert killed.returncode == 99, killed.stderr
    left = {path.name for path in out.iterdir()}
    assert left
    assert all(re.fullmatch(r"model-\d+\.safetensors", name) for name in left)  # no index, no config, no report
    assert not saved.exists()
    done = mergekit_yaml(config, out, *options)
    assert done.returncode == 0, done.stderr
    undisturbed = config | {"parameters": config["parameters"] | {"save_alignment": str(tmp_path / "undisturbed")}}
    merged(undisturbed, tmp_path / "again", out_shard_size=50000)
    assert _bytes(out) == _bytes(tmp_path / "again")
    assert _bytes(saved) == _bytes(tmp_path / "undisturbed")
    models = [{"model": paths["sibling-twin"], "parameters": {"alignment": str(saved / "sibling-twin.safetensors")}}]
    from_file = merge_config("aligned_task_arithmetic", paths["anchor"], models, parameters={"weight": 1.0})
    found = merged(from_file, tmp_path / "file")
    assert all(torch.equal(x, found[name]) for name, x in load(out).items())


def _bytes(folder: Path) -> dict[str, bytes]:
    """The weights in a folder, file by file."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}
    assert found
    return found


def test_two_models_and_a_third_by_weights(llama: Twins, tmp_path: Path) -> None:
    """One run serves all models; blocks that are matched by weights are what they are without any prompts."""
    paths = llama.paths
    by = [{"filter": "layers.2.", "value": "weights"}, {"value": "activations"}]
    settings = {"objective": by, "calibration": str(llama.prompts), "weight": 1.0}
    models = [
        paths["anchor-twin"],
        {"model": paths["sibling-twin"]},
        {"model": paths["sibling"], "parameters": {"align": False}},
    ]

    def merge(models: list[Any], name: str, **parameters: Any) -> State:
        config = merge_config("aligned_task_arithmetic", paths["anchor"], models, parameters=parameters)
        return merged(config, tmp_path / name)

    mixed, weights = merge(models, "mixed", **settings), merge(models, "weights", weight=1.0)
    same = {name: torch.equal(x, weights[name]) for name, x in mixed.items() if "self_attn" in name}
    assert {name for name, equal in same.items() if equal} == {name for name in same if "layers.2." in name}
    # Of the two aligned models either result is about the sibling's noise from the anchor.
    assert off_by(mixed, weights) * EPS < 4 * NOISE


def test_deep_models_hold_one_layer_at_a_time(tmp_path: Path) -> None:
    """Replay the executor's schedule of a twelve-layer merge: layers in order, one of each model alive."""
    models = [save(make_model("llama", i, num_hidden_layers=12), tmp_path / str(i)) for i in range(2)]
    for path in models:
        word_tokenizer(97).save_pretrained(path)
    settings = {"weight": 1.0, "objective": "activations", "calibration": str(prompts(tmp_path / "p.jsonl", tokens=50))}
    config = merge_config("aligned_task_arithmetic", models[0], models[1:], parameters=settings)
    merge, options = MergeConfiguration.model_validate(config), MergeOptions()
    LoaderCache().setup(options)
    planner = MergePlanner(merge, get_architecture_info(merge, options), options, merge.base_model.config())
    executor = Executor(planner.plan_to_disk(str(tmp_path / "out")))
    last_use, alive, ran = executor.schedule.last_use_index, {}, []
    for step, handle in enumerate(executor.schedule.tasks):
        task = handle.task()
        if isinstance(task, LoadFinite) and ".layers." in task.tensor:
            alive[handle] = int(task.tensor.split(".")[2])
        if isinstance(task, RunLayer):
            ran.append(task.layer)
        assert len(set(alive.values())) <= 1, (step, set(alive.values()))
        alive = {h: layer for h, layer in alive.items() if last_use[h] > step}
    assert ran == list(range(12))


def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all tensors hold when each layer of a solve starts; the elements of the layers before are all that stays."""
    models = [save(make_model("llama", i, num_hidden_layers=10), tmp_path / str(i)) for i in range(2)]
    for path in models:
        word_tokenizer(97).save_pretrained(path)
    file, held = prompts(tmp_path / "p.jsonl", tokens=300), []
    execute = RunLayer.execute

    def watched(self: RunLayer, **given: Any) -> Any:
        if self.layer in (1, 9):
            held.append(_held())
        return execute(self, **given)

    monkeypatch.setattr(RunLayer, "execute", watched)
    settings = {"objective": "activations", "calibration": str(file)}
    run_solve(*map(str, models), tmp_path / "a.safetensors", MergeOptions(quiet=True), settings)
    layer = sum(x.nbytes for name, x in load(models[0]).items() if ".layers.0." in name)
    assert held[1] - held[0] < 8 * layer / 4


def _held() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
