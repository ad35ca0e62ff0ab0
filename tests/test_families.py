"""Family files against the transformers models they describe."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from models import FAMILIES, logits, make_model, relative_deviation, with_weights
from more_models import MORE
from transformers import LlamaConfig, Qwen3Config

import mergekit_symalign
from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families import known
from mergekit_symalign.families.known import wrappers
from mergekit_symalign.families.resolve import families, is_block_tensor, resolve, supported_architectures
from mergekit_symalign.families.schema import BlockKind, Positions
from mergekit_symalign.planting import Planted, random_elements, transform

BIASED = {
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
}
CASES = {name: (name, {}) for name in FAMILIES} | BIASED


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest):
    family, overrides = CASES[request.param]
    return make_model(family, 0, **overrides)


def test_every_weight_is_claimed_with_its_shape(model) -> None:
    layout = resolve(model.config, model="m")
    for name, x in model.state_dict().items():
        claim = layout.claim(name)
        assert claim is not None, name
        expected = layout.shape(claim.spec)
        assert len(expected) == x.ndim
        assert all(want in (None, got) for want, got in zip(expected, x.shape, strict=True)), name
    parts = ((i, part, spec) for i in range(layout.layers) for part, spec in layout.parts(i).items())
    promised = {layout.name(layer, part) for layer, part, spec in parts if not spec.optional}
    assert promised <= set(model.state_dict())


@pytest.mark.parametrize("neuron_scaling", [False, True])
def test_random_elements_of_every_block_keep_the_function(model, neuron_scaling: bool) -> None:
    layout = resolve(model.config, model="m")
    elements = random_elements(layout, 1, Planted(neuron_scaling=neuron_scaling))
    twin = transform(model.state_dict(), layout, elements)
    changed = [name for name, x in twin.items() if not torch.equal(x, model.state_dict()[name])]
    in_blocks = [name for name in twin if (claim := layout.claim(name)) and claim.spec.block]
    assert sorted(changed) == sorted(in_blocks)
    assert relative_deviation(logits(model), logits(with_weights(model, twin))) < 1e-9


@pytest.mark.parametrize("kind", [BlockKind.attention, BlockKind.mlp])
def test_half_of_an_element_changes_the_function(model, kind: BlockKind) -> None:
    """The check above can fail: one tensor of a block left behind shows at once."""
    layout = resolve(model.config, model="m")
    twin = transform(model.state_dict(), layout, random_elements(layout, 1))
    for part, spec in layout.block(kind).items():
        name = layout.name(0, part)
        if name not in twin or (spec.axes == ("key",) and layout.family.attention.positions is Positions.none):
            continue  # without positions a bias of the keys adds the same to all scores of a query: softmax ignores it
        wrong = twin | {name: model.state_dict()[name]}
        assert relative_deviation(logits(model), logits(with_weights(model, wrong))) > 1e-3, part


def test_inverse_elements_give_the_model_back(model) -> None:
    layout = resolve(model.config, model="m")
    elements = random_elements(layout, 2, Planted(neuron_scaling=True))
    there = transform(model.state_dict(), layout, elements)
    back = transform(there, layout, {key: g.inverse() for key, g in elements.items()})
    for name, x in model.state_dict().items():
        torch.testing.assert_close(back[name], x)


def test_unsupported_architecture_names_the_nearest() -> None:
    with pytest.raises(ArchitectureError, match=r"GPT9LMHeadModel is not supported.*GPT2LMHeadModel") as error:
        resolve(LlamaConfig(architectures=["GPT9LMHeadModel"]), model="org/gpt9")
    assert "org/gpt9" in str(error.value)
    assert "mergekit-symalign families lists all" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "config.partial_rotary_factor is 0.5"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "32 query heads.*5 KV heads"),
        ({"head_dim": 33}, "head dimension 33 is odd"),
    ],
)
def test_unknown_variants_are_refused(change: dict, message: str) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ArchitectureError, match=message):
        resolve(config, model="m")


def test_unknown_rope_type_is_refused() -> None:
    config = Qwen3Config(architectures=["Qwen3ForCausalLM"])
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ArchitectureError, match=r"rope_parameters.rope_type is 'spiral'.*'yarn'"):
        resolve(config, model="m")


def test_block_tensors_are_told_by_name() -> None:
    assert is_block_tensor("model.layers.11.self_attn.q_proj.weight")
    assert is_block_tensor("model.layers.0.mlp.down_proj.weight")
    assert not any(map(is_block_tensor, ("w", "lm_head.weight", "model.layers.1.input_layernorm.weight")))


def test_family_files_are_named_after_themselves() -> None:
    assert all(name == family.name for name, family in families().items())
    architectures = [a for family in families().values() for a in family.architectures]
    assert len(architectures) == len(set(architectures))


def test_mathematics_and_families_do_not_import_mergekit() -> None:
    package = Path(mergekit_symalign.__file__).parent
    for folder in ("symmetry", "families"):
        for file in (package / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(
                    n == "mergekit" or n.startswith(("mergekit.", "mergekit_symalign.graph")) for n in names
                ), file


def test_only_the_hook_assigns_to_mergekit() -> None:
    """Patched names of MergeKit's appear as assignment targets in hook.py alone."""
    package = Path(mergekit_symalign.__file__).parent
    patched = {"_plan", "plan_flat_merge", "get", "tensor_task"}
    for file in package.rglob("*.py"):
        targets = {
            target.attr
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Attribute)
        }
        assert file.name == "hook.py" or not targets & patched, file


def test_importing_the_package_is_light() -> None:
    source = Path(mergekit_symalign.__file__).read_text("utf-8")
    imported = {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"importlib"}
    assert mergekit_symalign.resolve is resolve


def test_the_page_of_architectures_lists_every_family() -> None:
    """``make architectures`` writes it; this fails when a family or test model was added without running it."""
    page = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text("utf-8")
    table, _, more = page.partition("## The residual stream")
    more, _, hub = more.partition("## More classes")[2].partition("### Code on the Hub")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "`" in line]
    others = [line.split(" | ") for line in more.splitlines() if line.startswith("| ") and "`" in line]
    assert [row[0].removeprefix("| ") for row in others] == list(MORE)
    assert all(float(row[3]) < 1e-9 for row in others)
    assert [row[0].removeprefix("| ") for row in rows] == list(FAMILIES)
    stand_ins = [line.split(" | ") for line in hub.splitlines() if line.startswith("| `")]
    assert all(float(row[2]) < 1e-9 for row in stand_ins)
    listed = set(re.findall(r"`(\w+)`", page.partition("## All transformers classes")[2]))
    assert listed >= set(supported_architectures())  # older versions of transformers lack some
    measured = {row[2].strip("`") for row in rows + others} | {row[0].strip("| `") for row in stand_ins}
    assert all(measured & set(family.architectures) for family in families().values() if family.architectures)
    assert all(measured & set(wrapper.architectures) for wrapper in wrappers().values())
    assert all(float(row[5]) < 1e-9 and float(row[6].rstrip(" |")) <= 1 for row in rows)


def test_a_class_alone_is_read_as_among_all():
    for name in known._listed():
        assert known._of_class(name, "model", name) == known._by_class()[name], name
