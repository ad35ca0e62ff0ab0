"""The orthogonal matrix nearest to each of several matrices, in a way that suits their device.

On the CPU that is one singular value decomposition each. A GPU takes those one after the other, some milliseconds each,
and inverts all matrices of a batch at once. So elsewhere it is Newton's iteration, scaled (Higham 1986): a dozen
inverses, however badly conditioned the matrices are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.threads import in_parallel

_MATRICES = 4  # that one thread decomposes at once
_STEPS = 11  # of Newton's iteration: enough for condition numbers up to 1e16
_ORTHOGONAL = 1e-12  # largest entry of RᵀR − 1, times the size, that is rounding


def polar_factor(m: Tensor) -> Tensor:
    """``U Vᵀ`` of ``m = U Σ Vᵀ`` [*, d, d], float64, for matrices that are not singular."""
    if not devices.on_cpu(m.device):
        found = newton_polar(m)
        if devices.are_all(are_orthogonal(found)):
            return found
    if m.ndim == 2:
        return _rotation_of(m)
    flat = m.reshape(-1, *m.shape[-2:])
    return torch.cat(in_parallel(_rotation_of, flat.split(_MATRICES), m.device)).reshape(m.shape)


def nuclear_norm(m: Tensor) -> Tensor:
    """The sum of the singular values of each matrix [*, d, d], float64; elsewhere than on the CPU of regular ones."""
    if not devices.on_cpu(m.device):
        return (polar_factor(m) * m).sum((-2, -1))
    flat = m.reshape(-1, *m.shape[-2:])
    sums = in_parallel(lambda x: torch.linalg.svdvals(x).sum(-1), flat.split(_MATRICES), m.device)
    return torch.cat(sums).reshape(m.shape[:-2])


def newton_polar(m: Tensor) -> Tensor:
    """The same by Newton's iteration. Asks the device for nothing; where it fails, the result is not orthogonal."""
    x = m
    for _ in range(_STEPS):
        inverse = torch.linalg.inv_ex(x).inverse
        scale = (torch.linalg.matrix_norm(inverse, keepdim=True) / torch.linalg.matrix_norm(x, keepdim=True)).sqrt()
        x = (scale * x + inverse.mT / scale) / 2
    return (3 * x - x @ (x.mT @ x)) / 2


def are_orthogonal(m: Tensor) -> Tensor:
    """Whether each matrix [*, d, d] is, to rounding; bool [*]."""
    d = m.shape[-1]
    eye = torch.eye(d, dtype=m.dtype, device=m.device)
    return (m.mT @ m - eye).abs().amax((-2, -1)) <= d * _ORTHOGONAL


def _rotation_of(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m)
    return u @ vh
