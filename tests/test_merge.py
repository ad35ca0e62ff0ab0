"""Merges through MergeKit: planted symmetries are undone, and everything else MergeKit does keeps working."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import State, load, merge_config, merged, squared_distance
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import (
    FAMILIES,
    ROUNDINGS,
    logits,
    make_model,
    off_by,
    perturbed,
    relative_deviation,
    rounding,
    save,
    with_weights,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_symalign.errors import GeometryError, ParameterError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph import solve
from mergekit_symalign.planting import Planted, random_elements, transform


class Trio:
    """Anchor, sibling, skill sibling; and the sibling in foreign coordinates: its planted twin."""

    def __init__(self, family: str, folder: Path, planted: Planted | None = None, **overrides: Any) -> None:
        self.family, self.folder = family, folder
        self.anchor = make_model(family, 0, **overrides)
        self.sibling, self.skill = perturbed(self.anchor, 0.1, 1), perturbed(self.anchor, 0.1, 2)
        layout = resolve(self.anchor.config, model=family)
        elements = random_elements(layout, 3, planted)
        self.twin = with_weights(self.sibling, transform(self.sibling.state_dict(), layout, elements))

    def path(self, name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
        """Where one of the models is saved."""
        path = self.folder / f"{name}-{str(dtype)[6:]}"
        if not path.exists():
            save(getattr(self, name), path, dtype, **kwargs)
        return path


@pytest.fixture(scope="session", params=FAMILIES)
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio("llama", tmp_path_factory.mktemp("llama"))


def _float32(model: PreTrainedModel) -> State:
    return {name: x.float() for name, x in model.state_dict().items()}


def _model_at(path: Path, like: PreTrainedModel) -> PreTrainedModel:
    """A merged model as transformers loads it (its own conversions of names and layouts included)."""
    return type(like).from_pretrained(path, dtype=torch.float32).eval()


def test_planted_model_computes_the_same(trio: Trio) -> None:
    assert relative_deviation(logits(trio.sibling), logits(trio.twin)) < 1e-9


def test_rotation_match_brings_a_twin_back(trio: Trio, tmp_path: Path) -> None:
    merged(merge_config("rotation_match", trio.path("anchor"), [trio.path("twin")]), tmp_path)
    out = _model_at(tmp_path, trio.anchor)
    anchor = _float32(trio.anchor)
    distance, before, planted = (
        squared_distance(anchor, _float32(model)) ** 0.5 for model in (out, trio.sibling, trio.twin)
    )
    size = sum(float(x.double().square().sum()) for x in anchor.values()) ** 0.5
    assert distance <= before + ROUNDINGS * torch.finfo(torch.float32).eps * size
    assert planted > 3 * before  # the planting moved it far away
    assert relative_deviation(logits(trio.sibling), logits(out)) < rounding(trio.sibling)


# MergeKit's own methods cannot merge these: buffers and norms it asks for are not there, its aliases fail, or (ViT) it
# does not know the names in the checkpoint and leaves the tensors out. Ours with nothing aligned stand in.
NOT_PLAINLY = ("bert", "cohere", "gpt-neox", "vit", "vit-classifier")


def test_aligned_merge_of_a_twin_is_the_merge_of_the_original(trio: Trio, tmp_path: Path) -> None:
    def merge(model: str, *, align: bool) -> State:
        ours = align or trio.family in NOT_PLAINLY
        aligned, unaligned = ({"align": x} if ours else {} for x in (align, False))
        models = [
            {"model": trio.path(model), "parameters": {"weight": 1.0} | aligned},
            {"model": trio.path("skill"), "parameters": {"weight": 1.0} | unaligned},
        ]
        method = "aligned_task_arithmetic" if ours else "task_arithmetic"
        return merged(merge_config(method, trio.path("anchor"), models), tmp_path / f"{align}-{model}")

    wanted = merge("sibling", align=False)
    plain_error = squared_distance(merge("twin", align=False), wanted) ** 0.5
    aligned_error = squared_distance(merge("twin", align=True), wanted) ** 0.5
    # An aligned sibling is no farther from the anchor than the sibling itself, so by no more than twice that from it.
    apart = 2 * squared_distance(_float32(trio.sibling), _float32(trio.anchor)) ** 0.5
    assert aligned_error <= apart < plain_error


def test_a_twin_aligns_to_the_same_weights_as_the_original(trio: Trio, tmp_path: Path) -> None:
    """Both are brought to the one optimum, so they meet there up to float32 rounding."""
    out = [
        merged(merge_config("rotation_match", trio.path("anchor"), [trio.path(name)]), tmp_path / name)
        for name in ("sibling", "twin")
    ]
    assert off_by(out[1], out[0]) < ROUNDINGS


@pytest.mark.parametrize("family", ["llama", "roberta", "olmoe"])
def test_neuron_scales_are_undone(family: str, tmp_path: Path) -> None:
    """Signed in gated MLPs and experts, positive in plain ones with ReLU."""
    trio = Trio(family, tmp_path, Planted(neuron_scaling=True))
    config = merge_config("rotation_match", trio.path("anchor"), [trio.path("twin")])
    merged(config | {"parameters": {"neuron_scaling": True}}, tmp_path / "with")
    merged(config, tmp_path / "without")
    with_scales, without = (_model_at(tmp_path / name, trio.anchor) for name in ("with", "without"))
    anchor = _float32(trio.anchor)
    before = squared_distance(_float32(trio.sibling), anchor)
    assert squared_distance(_float32(with_scales), anchor) <= before
    assert squared_distance(_float32(without), anchor) > 2 * before
    assert relative_deviation(logits(trio.sibling), logits(with_scales)) < rounding(trio.sibling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_align_is_the_plain_merge_bit_for_bit(llama: Trio, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same blocks, other norms and embeddings: MergeKit's own arithmetic in its own dtype."""
    other = with_weights(llama.anchor, llama.anchor.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm" in name or "embed" in name:
                parameter.mul_(1.1)
    save(other, tmp_path / "other", dtype)
    base, name = llama.path("anchor", dtype), str(dtype)[6:]
    models = [{"model": tmp_path / "other", "parameters": {"weight": 0.7}}]
    for extra in ({"dtype": name}, {"dtype": None}, {"dtype": "float32", "out_dtype": name}):
        plain, aligned = (
            merged(merge_config(method, base, models, **extra), tmp_path / method)
            for method in ("task_arithmetic", "aligned_task_arithmetic")
        )
        assert all(torch.equal(x, aligned[k]) and x.dtype == aligned[k].dtype for k, x in plain.items())


def test_merge_is_rounded_once(llama: Trio, tmp_path: Path) -> None:
    """bf16 in and out: where weights are turned, the aligned merge is the float32 merge of the same bf16 checkpoints,
    rounded at the end; where neurons only change places, it is the plain merge of a model stored in that order."""
    paths = [llama.path(name, torch.bfloat16) for name in ("anchor", "twin")]
    models = [{"model": paths[1], "parameters": {"weight": 0.5}}]
    config = merge_config("aligned_task_arithmetic", paths[0], models)
    once = merged(config | {"dtype": "bfloat16"}, tmp_path / "once")
    exact = merged(config | {"dtype": "float32"}, tmp_path / "exact")
    match = merge_config("rotation_match", paths[0], [paths[1]]) | {"dtype": "bfloat16"}
    merged(match, tmp_path / "ordered")
    plain_models = [{"model": tmp_path / "ordered", "parameters": {"weight": 0.5}}]
    plain = merged(merge_config("task_arithmetic", paths[0], plain_models) | {"dtype": "bfloat16"}, tmp_path / "plain")
    for name, x in exact.items():
        if ".self_attn." in name:
            assert torch.equal(once[name], x.bfloat16()), name
        if ".mlp." in name:
            assert torch.equal(once[name], plain[name]), name
    assert all(x.dtype is torch.bfloat16 for x in once.values())
    unset = merged(config | {"dtype": None}, tmp_path / "unset")
    assert all(x.dtype is torch.bfloat16 and torch.equal(x, once[k]) for k, x in unset.items())


def test_anchor_takes_part_only_if_listed(llama: Trio, tmp_path: Path) -> None:
    anchor, sibling = llama.path("anchor"), llama.path("sibling")
    alone = merged(merge_config("rotation_match", anchor, [sibling]), tmp_path / "alone")
    both = merged(merge_config("rotation_match", anchor, [anchor, sibling]), tmp_path / "both")
    weighted = [{"model": anchor, "parameters": {"weight": 3.0}}, {"model": sibling, "parameters": {"weight": 1.0}}]
    quarter = merged(merge_config("rotation_match", anchor, weighted), tmp_path / "quarter")
    summed = merged(
        merge_config("rotation_match", anchor, weighted, parameters={"normalize": False}), tmp_path / "summed"
    )
    for name, x in _float32(llama.anchor).items():
        torch.testing.assert_close(both[name], (x + alone[name]) / 2)
        torch.testing.assert_close(quarter[name], (3 * x + alone[name]) / 4)
        torch.testing.assert_close(summed[name], 3 * x + alone[name])
    torch.testing.assert_close(alone["lm_head.weight"], _float32(llama.sibling)["lm_head.weight"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("parameters", "moved"),
    [
        ({"heads": False, "rotation": "none", "scaling": False}, {"mlp"}),
        ({"permutation": False, "rotation": "none", "scaling": False}, {"self_attn"}),
        ({"permutation": False, "scaling": False}, {"self_attn"}),
        ({"permutation": False, "rotation": "none"}, {"self_attn"}),
        ({"permutation": False, "heads": False, "rotation": "none", "scaling": False}, set()),
        ({"align": False}, set()),
    ],
)
def test_each_symmetry_alone(llama: Trio, parameters: dict[str, Any], moved: set[str], tmp_path: Path) -> None:
    config = merge_config("rotation_match", llama.path("anchor"), [llama.path("twin")], parameters=parameters)
    out, twin = merged(config, tmp_path), _float32(llama.twin)
    changed = {
        part
        for name, x in out.items()
        if not torch.equal(x, twin[name])
        for part in name.split(".")
        if part in ("mlp", "self_attn")
    }
    assert changed == moved
    assert relative_deviation(logits(llama.sibling), logits(with_weights(llama.anchor, out))) < rounding(llama.sibling)
    anchor = _float32(llama.anchor)
    assert squared_distance(out, anchor) <= squared_distance(twin, anchor)


def test_rotation_full_warns_and_changes_the_function(
    llama: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = merge_config("rotation_match", llama.path("anchor"), [llama.path("sibling")])
    with caplog.at_level(logging.WARNING):
        exact = merged(config, tmp_path / "exact")
        assert "does not commute with RoPE" not in caplog.text
        full = merged(config | {"parameters": {"rotation": "full"}}, tmp_path / "full")
    assert "does not commute with RoPE" in caplog.text
    anchor = _float32(llama.anchor)
    assert squared_distance(full, anchor) < squared_distance(exact, anchor)  # it fits better
    deviation, broken = (
        relative_deviation(logits(llama.sibling), logits(with_weights(llama.anchor, state))) for state in (exact, full)
    )
    assert deviation < rounding(llama.sibling) < broken / 100


def test_parameters_at_every_level(llama: Trio, tmp_path: Path) -> None:
    """Per model beats global; a gradient picks layers; a filter picks blocks."""
    anchor, twin = llama.path("anchor"), llama.path("twin")

    def aligned_layers(config: dict[str, Any], block: str) -> list[int]:
        out, before = merged(config, tmp_path), _float32(llama.twin)
        name = "model.layers.{}." + {"mlp": "mlp.up_proj.weight", "attention": "self_attn.q_proj.weight"}[block]
        return [i for i in range(3) if not torch.equal(out[name.format(i)], before[name.format(i)])]

    base = merge_config("rotation_match", anchor, [twin])
    off = base | {"parameters": {"align": False}}
    on_again = merge_config("rotation_match", anchor, [{"model": twin, "parameters": {"align": True}}])
    assert aligned_layers(off, "mlp") == []
    assert aligned_layers(on_again | {"parameters": {"align": False}}, "mlp") == [0, 1, 2]
    assert aligned_layers(base | {"parameters": {"align": [True, False, False]}}, "attention") == [0]
    mlp_only = [{"filter": "mlp", "value": True}, {"value": False}]
    assert aligned_layers(base | {"parameters": {"align": mlp_only}}, "mlp") == [0, 1, 2]
    assert aligned_layers(base | {"parameters": {"align": mlp_only}}, "attention") == []


def test_slices_align_the_layers_that_are_merged(llama: Trio, tmp_path: Path) -> None:
    """Layers 1 and 2 of a model against layers 0 and 1 of the anchor, planted twin and original alike."""

    def merge(method: str, model: str, **align: Any) -> State:
        sources = [
            {"model": str(llama.path("anchor")), "layer_range": [0, 2]},
            {"model": str(llama.path(model)), "layer_range": [1, 3], "parameters": {"weight": 0.5} | align},
        ]
        config = {"merge_method": method, "base_model": str(llama.path("anchor")), "dtype": "float32"}
        return merged(config | {"slices": [{"sources": sources}]}, tmp_path / f"{method}-{model}")

    out = {name: merge("aligned_task_arithmetic", name) for name in ("sibling", "twin")}
    assert (
        json.loads((tmp_path / "aligned_task_arithmetic-twin" / "config.json").read_text("utf-8"))["num_hidden_layers"]
        == 2
    )
    assert {name.split(".")[2] for name in out["twin"] if "layers" in name} == {"0", "1"}
    plain = merge("task_arithmetic", "twin")
    gap = squared_distance(out["twin"], out["sibling"])
    assert gap < 1e-6 * squared_distance(plain, out["sibling"])
    again = merge("aligned_task_arithmetic", "sibling", align=False)
    assert squared_distance(again, merge("task_arithmetic", "sibling")) == 0


def test_sharded_and_pickled_inputs_and_shards_out(llama: Trio, tmp_path: Path) -> None:
    save(llama.twin, tmp_path / "sharded", torch.float32, max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    pickled = tmp_path / "pickled"
    save(llama.twin, pickled, torch.float32)
    torch.save(load(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    wanted = merged(merge_config("rotation_match", llama.path("anchor"), [llama.path("twin")]), tmp_path / "wanted")
    for name, options in (
        ("sharded", {"out_shard_size": 100_000, "async_write": True}),
        ("pickled", {"lazy_unpickle": True}),
        ("pickled", {"lazy_unpickle": False, "low_cpu_memory": True, "read_to_gpu": True}),
    ):
        out = merged(merge_config("rotation_match", llama.path("anchor"), [tmp_path / name]), tmp_path / "o", **options)
        assert squared_distance(wanted, out) == 0
        for file in (tmp_path / "o").iterdir():
            file.unlink()


def test_lora_references_are_merged_first(llama: Trio, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama.path("twin")),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
    reference = f"{llama.path('twin')}+{tmp_path / 'adapter'}"
    models = [[reference], [tmp_path / "tuned"]]
    a, b = (
        merged(
            merge_config("rotation_match", llama.path("anchor"), m),
            tmp_path / str(i),
            lora_merge_cache=str(tmp_path / "l"),
        )
        for i, m in enumerate(models)
    )
    assert squared_distance(a, b) < 1e-9


def test_inputs_are_never_written_to(llama: Trio, tmp_path: Path) -> None:
    paths = [llama.path("anchor"), llama.path("twin")]
    before = [{f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in p.iterdir()} for p in paths]
    merged(merge_config("rotation_match", paths[0], [paths[1]]), tmp_path)
    assert before == [{f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in p.iterdir()} for p in paths]


def test_many_models_each_aligned_to_the_anchor(llama: Trio, tmp_path: Path) -> None:
    layout = resolve(llama.anchor.config, model="m")
    second = with_weights(llama.skill, transform(llama.skill.state_dict(), layout, random_elements(layout, 9)))
    save(second, tmp_path / "second")

    def mean(models: list[Path], out: str) -> State:
        return merged(merge_config("rotation_match", llama.path("anchor"), models), tmp_path / out)

    wanted = mean([llama.path("sibling"), llama.path("skill")], "w")
    got = mean([llama.path("twin"), tmp_path / "second"], "g")
    scale = squared_distance(wanted, {k: torch.zeros_like(x) for k, x in wanted.items()})
    assert squared_distance(wanted, got) < 1e-9 * scale


def test_merge_in_memory_is_the_merge_on_disk(llama: Trio, tmp_path: Path) -> None:
    """As mergekit-evolve plans it; MergeKit 0.1.5 alone cannot."""
    models = [{"model": llama.path("twin"), "parameters": {"weight": 0.5}}]
    config = merge_config("aligned_task_arithmetic", llama.path("anchor"), models)
    out = {task.weight_info.name: x for task, x in Executor(_planned_in_memory(config, llama)).run(quiet=True)}
    on_disk = merged(config, tmp_path)
    assert out.keys() == on_disk.keys()
    assert all(torch.equal(x, out[name]) for name, x in on_disk.items())


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_models_are_aligned_side_by_side_as_each_by_itself(llama: Trio, tmp_path: Path) -> None:
    alone = []
    for name in ("twin", "skill"):
        config = merge_config("rotation_match", llama.path("anchor"), [llama.path(name)])
        merged(config, tmp_path / name)
        alone.append(json.loads((tmp_path / name / "symalign_report.json").read_text("utf-8"))["models"])
    merged(merge_config("rotation_match", llama.path("anchor"), [llama.path("twin"), llama.path("skill")]), tmp_path)
    assert json.loads((tmp_path / "symalign_report.json").read_text("utf-8"))["models"] == {**alone[0], **alone[1]}


@pytest.mark.usefixtures("_two_threads")
def test_errors_of_a_solve_beside_another_come_out_of_its_thread(llama: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise GeometryError("tensor w", "it does not fit", "Use another")

    monkeypatch.setattr(solve, "solve_block", fail)
    models = [{"model": llama.path(m), "parameters": {"weight": 1.0}} for m in ("twin", "skill")]
    plan = _planned_in_memory(merge_config("aligned_task_arithmetic", llama.path("anchor"), models), llama)
    with click.Context(click.Command("merge")), pytest.raises(GeometryError, match=r"tensor w: .* Use another"):
        list(Executor(plan).run(quiet=True))


def test_a_merge_in_memory_saves_no_alignments(llama: Trio, tmp_path: Path) -> None:
    config = merge_config("rotation_match", llama.path("anchor"), [llama.path("twin")])
    with pytest.raises(ParameterError, match="save_alignment: the merge is planned in memory, which writes no files"):
        _planned_in_memory(config | {"parameters": {"save_alignment": str(tmp_path / "saved")}}, llama)


def _planned_in_memory(config: dict[str, Any], llama: Trio) -> Any:
    parsed, options = MergeConfiguration.model_validate(config), MergeOptions()
    LoaderCache().setup(options)
    architecture = get_architecture_info(parsed, options)
    return MergePlanner(parsed, architecture, options, out_model_config=llama.anchor.config).plan_in_memory()
