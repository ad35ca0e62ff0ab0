"""Joint optima of rotation and scale: against a fine grid, against scipy, and against the papers' two steps."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from mergekit_symalign.symmetry.groups import AxisAction, HeadRotation
from mergekit_symalign.symmetry.heads.joint import joint_optimum
from mergekit_symalign.symmetry.heads.moments import Moments, moments, of_planes, plane_correlation
from mergekit_symalign.symmetry.heads.procrustes import (
    align_gains,
    align_heads,
    align_heads_in_turn,
    align_planes,
    align_signs,
)
from mergekit_symalign.symmetry.scale import PROVEN, joint_log_scale, quartic_scale

D = torch.float64
HEADS, DIM, COLUMNS = 4, 8, 40
EXACT = 1e-9  # of the squared norms: float64 sums over 1e4 terms, with room for the one-dimensional search


class Sides:
    """Two random sides of a block, anchor and model, for a kind of relation between the two."""

    def __init__(self, relation: str, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=D)

        self.first_a, self.second_a = normal(HEADS * DIM, COLUMNS), 0.4 * normal(HEADS * DIM, COLUMNS)
        if relation == "unrelated":
            self.first_b, self.second_b = 3 * normal(HEADS * DIM, COLUMNS), 0.1 * normal(HEADS * DIM, COLUMNS)
            return
        noise = {"planted": 0.0, "sibling": 0.1, "distant": 1.0}[relation]
        scale = torch.logspace(-1.5, 1.5, HEADS, base=2.0, dtype=D)
        self.planted = HeadRotation(torch.linalg.qr(normal(HEADS, DIM, DIM)).Q, scale)
        self.first_b = self.planted(self.first_a + noise * normal(HEADS * DIM, COLUMNS), 0)
        self.second_b = self.planted.dual()(self.second_a + 0.4 * noise * normal(HEADS * DIM, COLUMNS), 0)

    @property
    def moments(self) -> tuple[Moments, Moments]:
        return moments(self.first_a, self.first_b, HEADS)[0], moments(self.second_a, self.second_b, HEADS)[0]

    def distances(self, g: AxisAction) -> Tensor:
        """Squared distance of each head after ``g``."""
        first, second = g(self.first_b, 0) - self.first_a, g.dual()(self.second_b, 0) - self.second_a
        return (first.square() + second.square()).reshape(HEADS, -1).sum(-1)

    @property
    def norm(self) -> float:
        return float(sum(x.square().sum() for x in (self.first_a, self.second_a, self.first_b, self.second_b)))


RELATIONS = ["planted", "sibling", "distant", "unrelated"]


@pytest.fixture(params=[(r, s) for r in RELATIONS for s in range(2)], ids=lambda p: f"{p[0]}-{p[1]}")
def sides(request: pytest.FixtureRequest) -> Sides:
    return Sides(*request.param)


def test_planted_rotation_and_scale_are_recovered() -> None:
    sides = Sides("planted", 7)
    found = align_heads(*sides.moments, rotate=True, scale=True)
    planted = sides.planted.inverse()
    torch.testing.assert_close(found.matrix, planted.matrix, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.scale, planted.scale, rtol=1e-9, atol=0)


def test_never_worse_than_rotation_then_scale(sides: Sides) -> None:
    joint = sides.distances(align_heads(*sides.moments, rotate=True, scale=True))
    in_turn = sides.distances(align_heads_in_turn(*sides.moments, scale=True))
    assert (joint <= in_turn + EXACT * sides.norm).all()


def test_strictly_better_than_in_turn_where_the_scale_matters() -> None:
    sides = Sides("distant", 0)
    joint = sides.distances(align_heads(*sides.moments, rotate=True, scale=True)).sum()
    assert joint < 0.999 * sides.distances(align_heads_in_turn(*sides.moments, scale=True)).sum()


def test_no_point_of_a_fine_grid_is_better(sides: Sides) -> None:
    found = sides.distances(align_heads(*sides.moments, rotate=True, scale=True))
    first, second = sides.moments
    for t in torch.linspace(-4, 4, 161, dtype=D):
        s = torch.exp(t)
        u, _, vh = torch.linalg.svd(s * first.cross + second.cross / s)
        grid = sides.distances(HeadRotation(u @ vh, s.expand(HEADS)))
        assert (found <= grid + EXACT * sides.norm).all()


@pytest.mark.parametrize("relation", ["planted", "sibling", "distant"])
def test_newton_proves_what_it_finds_in_related_heads(relation: str) -> None:
    first, second = Sides(relation, 0).moments
    found = joint_optimum(first.cross, second.cross, first.model.sum(-1), second.model.sum(-1))
    assert found.proven.all()


@pytest.mark.parametrize("d", [1, 2, 8])
def test_newton_proves_nothing_that_is_not_so(d: int) -> None:
    """Among problems with two separate minima, too, and with any ratio of the correlations to the norms."""
    g = torch.Generator().manual_seed(d)
    m, n = (torch.randn(500, d, d, generator=g, dtype=D) for _ in range(2))
    b, o = (d**1.5 * torch.logspace(-3, 1, 500, dtype=D)[torch.randperm(500, generator=g)] for _ in range(2))
    found = joint_optimum(m, n, b, o)

    def f(s: Tensor, nuclear: Tensor) -> Tensor:
        return s**2 * b + o / s**2 - 2 * nuclear

    p, q = ((found.matrix * x).sum((-2, -1)) for x in (m, n))
    best = f(found.scale, found.scale * p + q / found.scale)
    lowest = torch.full_like(b, torch.inf)
    for s in torch.logspace(-6, 6, 301, base=2.0, dtype=D):
        lowest = torch.minimum(lowest, f(s, torch.linalg.svdvals(s * m + n / s).sum(-1)))
    assert (best <= lowest + PROVEN * (b + o))[found.proven].all()
    assert 50 < found.proven.sum() < 500


@pytest.mark.parametrize("planes", [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
def test_turns_of_planes_see_no_more_than_their_correlations(planes: list[int]) -> None:
    sides = Sides("unrelated", 0)
    whole = Moments(moments(sides.first_a, sides.first_b, HEADS)[0].cross[:, :6, :6], torch.ones(HEADS, 6, dtype=D))
    least = of_planes(plane_correlation(whole.at(planes).cross), planes)
    turn = torch.zeros(HEADS, 6, 6, dtype=D)
    x, y = torch.randn(2, HEADS, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    i, j = torch.tensor(planes).chunk(2)
    turn[:, i, i], turn[:, j, j], turn[:, i, j], turn[:, j, i] = x, x, -y, y
    torch.testing.assert_close((turn * least).sum((1, 2)), (turn * whole.cross).sum((1, 2)))
    kept = (plane_correlation(Moments(x, whole.model).at(planes).cross) for x in (least, whole.cross))
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("planes", [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_moments_of_planes_alone(planes: list[int], stored: str) -> None:
    """What `of_planes` keeps of the whole products, without them; symmetric to the last bit for equal models."""
    a, b = (
        x.reshape(HEADS, DIM, -1)[:, :6].flatten(0, 1)
        for x in (Sides("unrelated", 0).first_a, Sides("unrelated", 1).first_a)
    )
    if stored == "columns":
        a, b = (x.mT.contiguous().mT for x in (a, b))
    order = torch.arange(HEADS).flip(0)
    whole, own = moments(a, b, HEADS, order)
    alone, own_alone = moments(a, b, HEADS, order, planes)
    assert torch.equal(own, own_alone)
    assert torch.equal(whole.model, alone.model)
    torch.testing.assert_close(alone.cross, of_planes(plane_correlation(whole.at(planes).cross), planes))
    same, _ = moments(a, a.clone(), HEADS, None, planes)
    assert (plane_correlation(same.at(planes).cross).imag == 0).all()


def test_rotation_alone_is_scipys_procrustes(sides: Sides) -> None:
    found = align_heads(*sides.moments, rotate=True, scale=False)
    both_a = torch.cat((sides.first_a, sides.second_a), 1).reshape(HEADS, DIM, -1)
    both_b = torch.cat((sides.first_b, sides.second_b), 1).reshape(HEADS, DIM, -1)
    for head in range(HEADS):
        reference, _ = orthogonal_procrustes(both_b[head].T.numpy(), both_a[head].T.numpy())
        torch.testing.assert_close(found.matrix[head], torch.from_numpy(reference).T, atol=1e-8, rtol=0)


def test_scale_alone_beats_a_grid_and_leaves_rotation_out(sides: Sides) -> None:
    found = align_heads(*sides.moments, rotate=False, scale=True)
    assert (found.matrix == torch.eye(DIM, dtype=D)).all()
    distances = sides.distances(found)
    for t in torch.linspace(-4, 4, 161, dtype=D):
        grid = sides.distances(HeadRotation(found.matrix, torch.exp(t).expand(HEADS)))
        assert (distances <= grid + EXACT * sides.norm).all()


def test_planes_beat_a_grid_of_angles_and_scales(sides: Sides) -> None:
    found = align_planes(*sides.moments, rotate=True, scale=True)
    distances = sides.distances(found)
    angles, scales = torch.meshgrid(
        torch.linspace(-torch.pi, torch.pi, 91, dtype=D), torch.logspace(-3, 3, 91, base=2.0, dtype=D), indexing="ij"
    )
    first, second = sides.moments
    # One plane at a time: the objective is a sum over planes, written out with complex rows.
    pairs = [_planes(x) for x in (sides.first_a, sides.first_b, sides.second_a, sides.second_b)]
    q_a, q_b, k_a, k_b = (p.reshape(HEADS * DIM // 2, COLUMNS) for p in pairs)
    best = torch.stack([_plane_grid(q_a[i], q_b[i], k_a[i], k_b[i], angles, scales) for i in range(len(q_a))])
    assert first.cross.shape == second.cross.shape == (HEADS, DIM, DIM)
    assert (distances <= best.reshape(HEADS, -1).sum(-1) + EXACT * sides.norm).all()
    one_by_one = align_planes(*sides.moments, rotate=True, scale=False)
    assert (distances <= sides.distances(one_by_one) + EXACT * sides.norm).all()


def _planes(x: Tensor) -> Tensor:
    first, second = x.reshape(HEADS, 2, DIM // 2, COLUMNS).unbind(1)
    return torch.complex(first, second)


def _plane_grid(q_a: Tensor, q_b: Tensor, k_a: Tensor, k_b: Tensor, angles: Tensor, scales: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(angles), angles)[..., None]
    s = scales[..., None]
    return ((s * turn * q_b - q_a).abs().square() + (turn * k_b / s - k_a).abs().square()).sum(-1).min()


def test_signs_are_the_better_ones() -> None:
    sides = Sides("sibling", 3)
    sign = torch.randint(2, (HEADS, DIM // 2), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    flip = sign.repeat(1, 2).flatten().to(D)
    first = moments(sides.first_a, flip[:, None] * (sides.first_a + 0.1 * sides.second_a), HEADS)[0]
    second = moments(sides.second_a, flip[:, None] * sides.second_a, HEADS)[0]
    torch.testing.assert_close(align_signs(first, second, of_heads=False).factor, flip)


@pytest.mark.parametrize("signed", [True, False])
def test_gains_trade_the_best_factor(signed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q_a, k_a = (1 + 0.3 * torch.randn(DIM, generator=g, dtype=D) for _ in range(2))
    planted = torch.tensor([0.5, 2.0, -1.5, 1.1], dtype=D).repeat(2)
    planted = planted if signed else planted.abs()
    query, key = ((q_a, q_a * planted), (k_a, k_a / planted))
    found = align_gains(*(tuple(x.reshape(1, 1, DIM) for x in pair) for pair in (query, key)), signed=signed)
    torch.testing.assert_close(found[0], 1 / planted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("relation", ["same", "low rank", "dead heads", "one side dead"])
def test_nothing_to_align_gives_the_identity(relation: str) -> None:
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(HEADS * DIM, COLUMNS, generator=g) for _ in range(2))
    if relation == "low rank":
        first, second = (x[:, :2] @ x[:2] for x in (first, second))
    if relation == "dead heads":
        first[:DIM], second[:DIM] = 0, 0
    if relation == "one side dead":
        second[:] = 0
    sides = moments(first, first.clone(), HEADS)[0], moments(second, second.clone(), HEADS)[0]
    for found in (
        align_heads(*sides, rotate=True, scale=True),
        align_planes(*sides, rotate=True, scale=True),
        align_heads(*sides, rotate=False, scale=True),
    ):
        assert found.snapped(torch.finfo(torch.float32).eps).is_identity(), found


def test_certificate_bounds_the_gap() -> None:
    """The proven gap is small, also for a problem with two separate minima."""
    b, o = torch.tensor([1.0, 1.0], dtype=D), torch.tensor([1.0, 1e-3], dtype=D)
    p, q = torch.tensor([1.0, 30.0], dtype=D), torch.tensor([0.2, -0.9], dtype=D)

    def g(t: Tensor) -> Tensor:
        return (torch.exp(t) * p[:, None] + torch.exp(-t) * q[:, None]).abs()

    found = joint_log_scale(b, o, (p.abs(), q.abs()), g)
    t = torch.linspace(-12, 12, 200001, dtype=D).expand(2, -1)
    grid = torch.exp(2 * t) * b[:, None] + torch.exp(-2 * t) * o[:, None] - 2 * g(t)
    at = found.log_scale[:, None]
    value = torch.exp(2 * at) * b[:, None] + torch.exp(-2 * at) * o[:, None] - 2 * g(at)
    assert (value[:, 0] - grid.amin(-1) <= found.gap + 1e-9 * grid.abs().amin(-1)).all()
    assert (found.gap <= 1e-5 * (p.square() + q.square() + b + o)).all()


def test_quartic_scale_finds_the_better_of_two_minima() -> None:
    generator = torch.Generator().manual_seed(0)
    b, o = (torch.rand(500, generator=generator, dtype=D) + 0.01 for _ in range(2))
    p, q = (4 * torch.randn(500, generator=generator, dtype=D) for _ in range(2))
    s = quartic_scale(b, o, p, q)
    grid = torch.logspace(-8, 8, 20001, base=2.0, dtype=D)[:, None]

    def f(s: Tensor) -> Tensor:
        return s**2 * b + o / s**2 - 2 * (s * p + q / s)

    assert (s > 0).all()
    assert (f(s) <= f(grid).amin(0) + 1e-9 * (b + o + p.abs() + q.abs())).all()
