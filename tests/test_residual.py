"""Changes of coordinates of the residual stream: exact, recovered, never farther, and the best of their kind."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
from models import logits, perturbed, relative_deviation
from scipy.linalg import orthogonal_procrustes
from streams import CASES, State, at_tokens, case, joined, split, stored
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.errors import ShapeError, SymmetryError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import residual_group, ties_embeddings
from mergekit_symalign.planting import Planted, random_elements, random_stream
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.residual.alternate import StreamAlignment, align_stream
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind, best_element, centred_basis
from mergekit_symalign.symmetry.residual.move import Elements, move_scope
from mergekit_symalign.symmetry.residual.scope import (
    FLOOR,
    Norm,
    Scope,
    floored,
    folded,
    norm_weights,
    norms_of,
    unfolded,
)

HIDDEN = 48
K = ResidualKind


def _kinds(model: PreTrainedModel, layout: ModelLayout) -> tuple[ResidualKind, ...]:
    return residual_group(layout, ties_embeddings(model.config, layout)).kinds[1:]


def _moved(
    layout: ModelLayout,
    state: State,
    kind: ResidualKind,
    norms: State,
    *,
    stream: BlockElement,
    blocks: list[Elements] | None = None,
    untie: bool = False,
) -> State:
    """A model in other coordinates, with the norms of another one where the stream turns."""
    scopes, parts = split(layout, state, untie=untie)
    _, others = split(layout, norms, untie=untie)
    own = blocks or [{} for _ in scopes]
    everything = zip(scopes, parts, others, own, strict=True)
    return joined(layout, [move_scope(s, x, kind, stream, b, norms_of(s, o)) for s, x, o, b in everything])


def _with(model: PreTrainedModel, state: State, **config: object) -> PreTrainedModel:
    settings = deepcopy(model.config)
    settings.update(config)
    copy = type(model)(settings).double().eval()
    missing = set(copy.load_state_dict(state, strict=False).missing_keys)
    assert missing <= set(getattr(copy, "all_tied_weights_keys", None) or {})
    copy.tie_weights()
    return copy


def _planted_blocks(layout: ModelLayout, seed: int) -> list[Elements]:
    found = random_elements(layout, seed, Planted())
    return [{}, *({kind.value: g for (i, kind), g in found.items() if i == layer} for layer in range(layout.layers))]


def _require_norms(layout: ModelLayout, state: State, wanted: State) -> None:
    """Those of the other model; a bias is only where its readers can take up the difference."""
    scopes, parts = split(layout, state)
    for scope, mine, theirs in zip(scopes, parts, split(layout, wanted)[1], strict=True):
        for norm in scope.norms:
            gain, bias = norms_of(scope, theirs)[norm.gain]
            torch.testing.assert_close(scope.axes[norm.gain].read(mine[norm.gain]), gain)
            if norm.bias is not None and norm.reader_biases:
                assert bias is not None
                assert torch.equal(mine[norm.bias], bias)


@pytest.mark.parametrize("name", CASES)
def test_every_admitted_kind_keeps_the_function(name: str) -> None:
    """Together with random elements of all blocks, and with the norms of another model where the stream turns."""
    model, other = case(name), case(name, 5)
    layout = resolve(model.config, model="m")
    kinds = _kinds(model, layout)
    assert bool(kinds) != layout.family.stream.returned
    for kind in kinds:
        stream = random_stream(kind, HIDDEN, 1)
        twin = _moved(layout, stored(model), kind, stored(other), stream=stream, blocks=_planted_blocks(layout, 2))
        assert relative_deviation(logits(model), logits(_with(model, twin))) < 1e-9, kind
        if kind.rotates:
            _require_norms(layout, twin, stored(other))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2-tied", "cohere"])
def test_tied_models_turn_with_a_head_of_their_own(name: str) -> None:
    model, other = case(name), case(name, 5)
    layout = resolve(model.config, model="m")
    kind = residual_group(layout, tied=False).rotation
    assert kind is not None
    stream = random_stream(kind, model.config.hidden_size, 1)
    twin = _moved(layout, stored(model), kind, stored(other), stream=stream, untie=True)
    untied = _with(model, twin, tie_word_embeddings=False)
    assert not torch.equal(untied.get_input_embeddings().weight, untied.get_output_embeddings().weight)
    assert relative_deviation(logits(model), logits(untied)) < 1e-9


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", K.rotation), ("phi2", K.mean_keeping_rotation), ("gemma2", K.signed_permutation)]
)
def test_any_tensor_left_behind_changes_the_function(name: str, kind: ResidualKind) -> None:
    model = case(name)
    layout = resolve(model.config, model="m")
    state, other = stored(model), stored(case(name, 5))
    twin = _moved(layout, state, kind, other, stream=random_stream(kind, HIDDEN, 1))
    for part in (x for x in state if ".1." in x or (".0." not in x and ".2." not in x)):
        changed = not torch.equal(twin[part], state[part])
        off = relative_deviation(logits(model), logits(_with(model, twin | {part: state[part]})))
        wrong = off > 1e-3 or "k_proj.bias" in part
        assert wrong if changed else off < 1e-9, part


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2-untied", "starcoder2-unbiased", "cohere2", "vit-classifier"])
def test_unfolded_is_the_inverse_of_folded(name: str) -> None:
    state = stored(case(name))
    layout = resolve(case(name).config, model="m")
    for scope, x in zip(*split(layout, state), strict=True):
        if all(norm.readers for norm in scope.norms):
            back = unfolded(scope, folded(scope, x), {norm.gain: norm_weights(scope, x, norm) for norm in scope.norms})
            for part, y in x.items():
                torch.testing.assert_close(back[part], y)


def test_gains_next_to_zero_stay_away_from_it_and_the_function_is_kept() -> None:
    model, anchor = case("llama"), case("llama", 5)
    layout = resolve(model.config, model="m")
    norms = stored(anchor)
    for x in norms.values():
        if x.ndim == 1:
            x[::3] = 0.0
            x[1::3] *= 1e-6
    twin = _moved(layout, stored(model), K.rotation, norms, stream=random_stream(K.rotation, HIDDEN, 1))
    gain = norms["model.norm.weight"]
    least = FLOOR * gain.square().mean().sqrt()
    assert bool((twin["model.norm.weight"].abs() >= least * (1 - 1e-12)).all())
    assert torch.equal(twin["model.norm.weight"][2::3], gain[2::3])
    assert bool((floored(-gain)[1::3] < 0).any())
    assert torch.equal(floored(torch.zeros(3)), torch.ones(3))
    assert relative_deviation(logits(model), logits(_with(model, twin))) < 1e-9


def test_a_bias_beside_a_gain_of_zero_is_refused_where_no_reader_can_take_it() -> None:
    axes = {"n.weight": TensorAxes((GAIN,)), "n.bias": TensorAxes((STREAM,)), "w.weight": TensorAxes(("other", STREAM))}
    scope = Scope(axes, (Norm("n.weight", "n.bias", ("w.weight",)),))
    x = {"n.weight": torch.tensor([1.0, 0.0]), "n.bias": torch.tensor([1.0, 2.0]), "w.weight": torch.ones(3, 2)}
    with pytest.raises(SymmetryError, match=r"norm n.weight: 1 of its gains are 0.*residual: permutation"):
        folded(scope, x)
    assert folded(scope, x | {"n.bias": torch.tensor([1.0, 0.0])})["n.bias"].tolist() == [1.0, 0.0]


RECOVERED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "gpt2", "bert", "modernbert", "mixtral"]
RECOVERED += ["vit-classifier", "phi2"]


def _aligned(layout: ModelLayout, anchor: State, model: State, kind: ResidualKind) -> tuple[StreamAlignment, State]:
    scopes, a = split(layout, anchor)
    _, b = split(layout, model)
    found = align_stream(scopes, lambda i: (a[i], b[i]), kind, rounds=2)
    moved = _moved(layout, model, kind, anchor, stream=found.stream, blocks=list(found.blocks))
    return found, moved


@pytest.mark.parametrize("name", RECOVERED)
def test_planted_coordinates_of_stream_and_blocks_are_recovered(name: str) -> None:
    model = case(name, num_hidden_layers=1)
    layout = resolve(model.config, model="m")
    near = stored(perturbed(model, 0.2, 7))
    for kind in _kinds(model, layout):
        twin = _moved(
            layout,
            near,
            kind,
            stored(case(name, 5, num_hidden_layers=1)),
            stream=random_stream(kind, HIDDEN, 1),
            blocks=_planted_blocks(layout, 2),
        )
        found, moved = _aligned(layout, stored(model), twin, kind)
        reference, wanted = _aligned(layout, stored(model), near, kind)
        assert found.distances[-1] <= 1.005 * reference.distances[-1] < 0.05 * found.distances[0]
        for part, x in wanted.items():
            torch.testing.assert_close(moved[part], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", K.rotation), ("phi2", K.permutation), ("llama", K.signed_permutation)]
)
def test_the_distance_falls_in_every_round_that_reads_every_layer_once(name: str, kind: ResidualKind) -> None:
    """Two models that have nothing in common."""
    one, other = case(name), case(name, 5)
    layout = resolve(one.config, model="m")
    scopes, a = split(layout, stored(one))
    _, b = split(layout, stored(other))
    reads: list[int] = []

    def read(i: int) -> tuple[State, State]:
        reads.append(i)
        return a[i], b[i]

    found = align_stream(scopes, read, kind, rounds=4)
    assert len(found.distances) > (2 if kind.rotates else 1)
    assert all(later < earlier for earlier, later in itertools.pairwise(found.distances))
    rounds = (len(reads) - 1) // (len(scopes) - 1)
    assert rounds <= 4
    assert reads == [0, *list(range(1, len(scopes))) * rounds]  # embeddings and head once: no block moves them
    moved = _moved(layout, stored(other), kind, stored(one), stream=found.stream, blocks=list(found.blocks))
    if not kind.rotates:
        distance = sum(float((x - moved[part]).square().sum()) for part, x in stored(one).items())
        assert distance == pytest.approx(found.distances[-1])


def test_tokens_that_both_have_are_enough() -> None:
    model = case("llama")
    layout = resolve(model.config, model="m")
    twin = _moved(
        layout, stored(model), K.rotation, stored(case("llama", 5)), stream=random_stream(K.rotation, HIDDEN, 1)
    )
    scopes, a = split(layout, stored(model))
    _, b = split(layout, twin)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(2))
    shuffled = at_tokens(scopes[0], b[0], order)  # another tokenizer: the same tokens elsewhere, and some of its own
    rows, where = torch.arange(60), torch.argsort(order)[:60]
    b[0], a[0] = at_tokens(scopes[0], shuffled, where), at_tokens(scopes[0], a[0], rows)
    found = align_stream(scopes, lambda i: (a[i], b[i]), K.rotation)
    assert found.distances[-1] < 1e-9 * found.distances[0]


def _cross(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _matrix(element: BlockElement, size: int) -> Tensor:
    return element.actions[STREAM](torch.eye(size, dtype=torch.float64), 0)


def test_the_best_rotation_is_that_of_procrustes() -> None:
    a, b = _cross(6, 1), _cross(6, 2)
    reference, _ = orthogonal_procrustes(b.mT.numpy(), a.mT.numpy())
    torch.testing.assert_close(_matrix(best_element(K.rotation, a @ b.mT), 6), torch.from_numpy(reference).mT)


def test_the_best_mean_keeping_rotation_is_at_the_optimum() -> None:
    """It keeps the mean, and no small turn that keeps the mean is better."""
    cross = _cross(7)
    q = _matrix(best_element(K.mean_keeping_rotation, cross), 7)
    ones = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(q @ ones, ones)
    torch.testing.assert_close(q.mT @ q, torch.eye(7, dtype=torch.float64))
    inside = centred_basis(7).mT @ q.mT @ cross @ centred_basis(7)
    torch.testing.assert_close(inside, inside.mT)
    assert bool((torch.linalg.eigvalsh(inside) > 0).all())


@pytest.mark.parametrize("kind", [K.permutation, K.signed_permutation])
def test_the_best_permutation_is_that_of_trying_all(kind: ResidualKind) -> None:
    cross, gains = _cross(5), _cross(5, 1).abs()
    scores = (cross.abs() if kind is K.signed_permutation else cross) + gains
    best = max(sum(float(scores[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    found = best_element(kind, cross, gains)
    q, order = _matrix(found, 5), found.actions[GAIN](torch.eye(5, dtype=torch.float64), 0)
    assert torch.equal(q.abs(), order)
    assert float((q * cross).sum() + (order * gains).sum()) == pytest.approx(best)


def test_cross_products_must_be_square() -> None:
    with pytest.raises(ShapeError, match="cross"):
        best_element(K.rotation, torch.ones(2, 3))
    with pytest.raises(ShapeError, match="gains"):
        best_element(K.permutation, torch.ones(2, 2), torch.ones(3, 3))
