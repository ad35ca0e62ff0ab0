"""One attention block written from its definition, in float64, with everything that a `HeadShape` may say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_symalign.planting import Planted, _Draw
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.options import GainScope, HeadShape, HeadValues, Sides, Symmetries
from mergekit_symalign.symmetry.solve import solve_block

HIDDEN = 32
Rows = dict[str, Tensor]


def random_rows(shape: HeadShape, seed: int) -> Rows:
    """The rows of every axis of a block."""
    g = torch.Generator().manual_seed(seed)
    own = ("query", "key", "attended") if shape.of_keys else ("query", "key", "value", "attended")
    axes = (*own, *(("attended_gate",) if shape.gated else ()))
    sizes = {axis: shape.heads(axis) * shape.head_dim for axis in axes}
    rows = {axis: torch.randn(n, HIDDEN, generator=g, dtype=torch.float64) for axis, n in sizes.items()}
    for axis, heads in (("query_gain", shape.query_heads), ("key_gain", shape.kv_heads)) if shape.qk_norm else ():
        n = shape.head_dim * (heads if shape.norm.per_head else 1)
        rows[axis] = 1 + 0.3 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    if shape.numbered:
        rows["query_head"] = torch.randn(shape.query_heads, 1, generator=g, dtype=torch.float64)
    return rows


def random_tokens(count: int = 12) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attention(rows: Rows, shape: HeadShape, x: Tensor) -> Tensor:
    """What the block adds to tokens [n, hidden]."""
    query, key = (_turned(_normed(x, rows, axis, shape), shape) for axis in ("query", "key"))
    value = (x @ rows["key" if shape.of_keys else "value"].mT).unflatten(-1, (shape.kv_heads, -1))
    if shape.values in (HeadValues.normed, HeadValues.keys):
        value = value / value.square().mean(-1, keepdim=True).sqrt()
    key, value = (y.repeat_interleave(shape.queries_per_kv, dim=1) for y in (key, value))
    score = torch.einsum("nhd,mhd->hnm", query, key)
    if shape.locked:
        slopes = 0.5 ** torch.arange(1, shape.query_heads + 1, dtype=torch.float64)
        at = torch.arange(len(x), dtype=torch.float64)
        score = score + slopes.reshape(-1, 1, 1) * (at.reshape(1, -1) - at.reshape(-1, 1))
    score = score.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    if shape.numbered:
        sinks = rows["query_head"].reshape(-1, 1, 1).expand(-1, len(x), 1)
        weights = torch.cat((score, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = score.softmax(-1)
    attended = torch.einsum("hnm,mhd->nhd", weights, value).flatten(1)
    if shape.gated:
        attended = attended * torch.sigmoid(x @ rows["attended_gate"].mT)
    return attended @ rows["attended"]


def _normed(x: Tensor, rows: Rows, axis: str, shape: HeadShape) -> Tensor:
    heads = shape.heads(axis)
    y = x @ rows[axis].mT
    if not shape.qk_norm:
        return y.unflatten(-1, (heads, -1)) / shape.head_dim
    gain = rows[f"{axis}_gain"].flatten()
    y = y if shape.norm is GainScope.all else y.unflatten(-1, (heads, -1))
    y = y - y.mean(-1, keepdim=True) if shape.norm is GainScope.centred else y
    y = y / y.square().mean(-1, keepdim=True).sqrt()
    y = y.reshape(len(x), heads, -1)
    return y * (gain.reshape(heads, -1) if shape.norm.per_head else gain)


def _turned(y: Tensor, shape: HeadShape) -> Tensor:
    y = y.clone()
    planes = shape.planes()
    for f, (a, b) in enumerate(zip(planes[: len(planes) // 2], planes[len(planes) // 2 :], strict=True)):
        angle = torch.arange(len(y), dtype=torch.float64) * 0.7 ** (f + 1)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        y[..., a], y[..., b] = cos * y[..., a] - sin * y[..., b], sin * y[..., a] + cos * y[..., b]
    return y


def moved(rows: Rows, element: BlockElement) -> Rows:
    return {axis: element.actions[axis](x, 0) if axis in element.actions else x for axis, x in rows.items()}


def noisy(rows: Rows, size: float, seed: int = 9) -> Rows:
    g = torch.Generator().manual_seed(seed)
    return {k: x + size * x.std() * torch.randn(x.shape, generator=g, dtype=x.dtype) for k, x in rows.items()}


def sides_of(anchor: Rows, model: Rows) -> Sides:
    return {axis: [(x, model[axis])] for axis, x in anchor.items()}


def distance(a: Rows, b: Rows) -> float:
    """Squared."""
    return sum(float((x - b[axis]).square().sum()) for axis, x in a.items())


def planted(shape: HeadShape, seed: int, what: Planted | None = None) -> BlockElement:
    """A random element of the block's group."""
    return _Draw(torch.Generator().manual_seed(seed), what or Planted()).attention(shape)


def wide(value: Tensor, shape: HeadShape) -> Tensor:
    """What every query head attends to, if each token attends to itself."""
    return value.unflatten(0, (shape.kv_heads, -1)).repeat_interleave(shape.queries_per_kv, dim=0).flatten(0, 1)


def seen_on(x: Tensor, anchor: Rows, model: Rows, shape: HeadShape) -> dict[str, Covariance]:
    """What anchor and model have in common on tokens [hidden, n], each of which attends to itself."""
    values = "key" if shape.of_keys else "value"
    seen = {axis: Covariance.of_rows([(anchor[axis] @ x, model[axis] @ x)]) for axis in ("query", "key", values)}
    read = Covariance.of_rows([(wide(anchor[values], shape) @ x, wide(model[values], shape) @ x)])
    return seen | {"attended": read}


def require_kept(element: BlockElement, shape: HeadShape) -> None:
    """It keeps the function of the block, and files that hold it, or undo it, are admitted."""
    rows, x = random_rows(shape, 0), random_tokens()
    before = attention(rows, shape, x)
    assert (attention(moved(rows, element), shape, x) - before).abs().max() < 1e-10 * before.std()
    for one in (element, element.inverse(), BlockElement.unpack(element.pack())):
        require_symmetry(one, shape)


def require_twins_back(shape: HeadShape, noise: float) -> None:
    """A planted twin ends no farther from the anchor than what it was made from, and the facts say how far."""
    anchor = random_rows(shape, 0)
    sibling = noisy(anchor, noise)
    for seed in range(2):
        twin = moved(sibling, planted(shape, seed))
        found = solve_block(sides_of(anchor, twin), shape, Symmetries())
        require_symmetry(found.element, shape)
        reached = distance(anchor, moved(twin, found.element))
        assert reached <= distance(anchor, sibling) * (1 + 1e-9) + 1e-12
        assert found.facts["distance_after"] == pytest.approx(reached, rel=1e-6, abs=1e-9)
        assert found.facts["distance_before"] == pytest.approx(distance(anchor, twin), rel=1e-6)
