"""The bound on the error of the Winograd rows (docs/kernels/winograd.md).

F(m x m, r x r) computes A^T [(G g G^T) * (B^T d B)] A. Its roundings act on the transformed numbers, which may be
larger than the terms of the sum, so the sum of the terms' magnitudes is replaced by the same algorithm on absolute
values, |A^T| [(|G| |g| |G^T|) * (|B^T| |d| |B|)] |A|, summed over the channels. A number meets at most C products and
additions and two passes through each of three transforms, of at most alpha roundings a pass.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from tests.support.cases import Conv2dCase
from tests.support.reference import Truth
from tests.support.rows import Row, choice, shape_of

# alpha: the pairs +-a beside the points 0 and infinity (csrc/cpu/kernels/conv2d_winograd_transform.inl)
PAIRS = {4: (1.0,), 6: (0.625, 1.5), 8: (0.5, 1.0, 2.0)}


def _vector(numbers: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)


def _coefficients(roots: list[float]) -> list[float]:
    """Of the product of (x - root), the constant one first."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [*coefficients, 0.0]
        coefficients = [high - root * low for high, low in zip(shifted, scaled, strict=True)]
    return coefficients


@functools.cache
def matrices(m: int, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A^T [m, alpha], G [alpha, r] and B^T [alpha, alpha] in float64, derived from the points."""
    alpha = m + r - 1
    points = [0.0] + [sign * a for a in PAIRS[alpha] for sign in (1, -1)]
    a_t, g, b_t = (torch.zeros(size, dtype=torch.float64) for size in ((m, alpha), (alpha, r), (alpha, alpha)))
    for j, point in enumerate(points):
        others = points[:j] + points[j + 1 :]
        scale = 1.0
        for other in others:
            scale *= point - other
        a_t[:, j] = _vector(point**i for i in range(m))
        g[j] = _vector(point**i / scale for i in range(r))
        b_t[j, :-1] = _vector(_coefficients(others))
    a_t[-1, -1] = g[-1, -1] = 1
    b_t[-1] = _vector(_coefficients(points))
    return a_t, g, b_t


def amplification(m: int, r: int) -> float:
    """c of F(m x m, r x r): absolute values give at most c * max|input| * sum|weights|."""
    a_t, g, b_t = (matrix.abs() for matrix in matrices(m, r))
    return (torch.einsum("ij,jk,jl->ik", a_t, g, b_t).max() ** 2).item()


def convolve(m: int, source, weight, first: tuple[int, int], size: tuple[int, int], absolute: bool = False):
    """F(m x m, r x r) in float64: the correlation of [N, C, H, W] with [K, C, r, r].

    first: the source position that output 0 reads first.
    absolute: everything by its magnitude.
    """
    take = torch.abs if absolute else torch.Tensor.clone
    r = weight.shape[-1]
    a_t, g, b_t = (take(matrix) for matrix in matrices(m, r))
    patches = _patches(take(source.double()), m, m + r - 1, first, size)
    sums = torch.einsum("ncyxab,kcab->nkyxab", b_t @ patches @ b_t.T, g @ take(weight.double()) @ g.T)
    outputs = (a_t @ sums @ a_t.T).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return outputs[:, :, : size[0], : size[1]]


def weight_gradient(m: int, r: int, source, grad_output, first: tuple[int, int], absolute: bool = False):
    """F(r x r, m x m) in float64: the gradient of the r x r weight of a correlation."""
    take = torch.abs if absolute else torch.Tensor.clone
    a_t, g, b_t = (take(matrix) for matrix in matrices(r, m))
    size = grad_output.shape[2:]
    inputs = _patches(take(source.double()), m, m + r - 1, first, size)
    outputs = _patches(take(grad_output.double()), m, m, (0, 0), size)
    sums = torch.einsum("nkyxab,ncyxab->kcab", g @ outputs @ g.T, b_t @ inputs @ b_t.T)
    return a_t @ sums @ a_t.T


def _patches(source: torch.Tensor, m: int, extent: int, first, size) -> torch.Tensor:
    """[N, C, tile row, tile column, extent, extent]: what the tiles of m x m of ``size`` outputs read."""
    reach = [begin - (-count // m) * m + extent - m for begin, count in zip(first, size, strict=True)]
    pads = (-first[1], reach[1] - source.shape[3], -first[0], reach[0] - source.shape[2])
    return F.pad(source, pads).unfold(2, extent, m).unfold(3, extent, m)


def tile_of(row: Row, case: Conv2dCase, dtype: torch.dtype, layouts) -> int:
    """m of the tile that the row takes: a register tile has 14 or 6 Winograd tiles of m * m outputs, or one."""
    return 4 if choice(row, shape_of(case, dtype, layouts))["tile_pixels"] % 16 == 0 else 2


def _problem(row: Row, case: Conv2dCase, input, weight, grad_output):
    """The row's correlation: source, weight, the source position that output 0 reads first, output size."""
    if row.direction == "forward":
        return input, weight, (-case.pad_top, -case.pad_left), case.output_size[2:]
    by_group = weight.unflatten(0, (case.groups, -1)).transpose(1, 2).flatten(0, 1)
    first = (case.pad_top - case.kernel_h + 1, case.pad_left - case.kernel_w + 1)
    return grad_output, by_group.flip(2, 3), first, case.input_size[2:]


def bounded(row: Row, case: Conv2dCase, dtype: torch.dtype, layouts, truth: Truth, operands: dict) -> Truth:
    """``truth`` with the magnitude and the roundings of the tile that ``row`` takes."""
    m = tile_of(row, case, dtype, layouts)
    operands = {name: operands.get(name) for name in ("input", "weight", "grad_output")}
    if row.direction == "backward_weight":
        return _bounded_weight(m, case, truth, **operands)
    source, weight, first, size = _problem(row, case, **operands)
    sources, weights = source.chunk(case.groups, 1), weight.chunk(case.groups, 0)
    magnitudes = [convolve(m, s, w, first, size, absolute=True) for s, w in zip(sources, weights, strict=True)]
    roundings = weight.shape[1] + 6 * (m + case.kernel_h - 1)
    return Truth(truth.value, torch.cat(magnitudes, 1) + truth.magnitude, roundings)


def _bounded_weight(m: int, case: Conv2dCase, truth: Truth, input, grad_output, **_) -> Truth:
    r, first = case.kernel_h, (-case.pad_top, -case.pad_left)
    groups = zip(input.chunk(case.groups, 1), grad_output.chunk(case.groups, 1), strict=True)
    magnitudes = [weight_gradient(m, r, source, outputs, first, absolute=True) for source, outputs in groups]
    tiles = case.batch * -(-case.out_h // m) * -(-case.out_w // m)
    return Truth(truth.value, torch.cat(magnitudes, 0) + truth.magnitude, tiles + 6 * (m + r - 1))
