"""Winograd convolution: its transforms, its bound over random and adversarial data, the switch that allows it, and that
one image's infinities change no other image.
"""

import pytest
import torch

import cnn_ext
from cnn_ext import policy
from tests.support import winograd
from tests.support.cases import Conv2dCase
from tests.support.reference import Truth, conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from tests.support.rows import CONV2D_LAYOUTS, accepts, rows, run_conv2d, shape_of
from tests.support.tolerances import violation

pytestmark = pytest.mark.usefixtures("one_thread")

TILES = [(2, 3), (4, 3), (4, 5)]
WINOGRAD_ROWS = [row for row in rows(op="conv2d") if "_winograd_" in row.name]


@pytest.fixture(autouse=True)
def default_policy():
    with cnn_ext.flags(winograd=False):
        yield


def a_case(m: int, r: int, batch: int = 2) -> Conv2dCase:
    """A case for which the rows take F(m x m, r x r)."""
    size = {2: 6, 4: 8}[m]
    return Conv2dCase(f"f{m}{r}", batch, 48, size, size, 48, r, r, 1, 1, *[r // 2] * 4, 1, 1, 1)


@pytest.mark.parametrize(("m", "r"), TILES)
def test_the_transforms_compute_the_convolution(m, r):
    source, weight = torch.randn(2, 3, 9, 11, dtype=torch.float64), torch.randn(4, 3, r, r, dtype=torch.float64)
    wanted = torch.nn.functional.conv2d(source, weight, padding=1)
    got = winograd.convolve(m, source, weight, (-1, -1), wanted.shape[2:])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "r"), TILES)
def test_the_transforms_compute_the_gradient_of_the_weight(m, r):
    source = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    weight = torch.zeros(4, 3, r, r, dtype=torch.float64, requires_grad=True)
    output = torch.nn.functional.conv2d(source, weight, padding=1)
    grad_output = torch.randn_like(output)
    (wanted,) = torch.autograd.grad(output, weight, grad_output)
    got = winograd.weight_gradient(m, r, source, grad_output, (-1, -1))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("m", "r"), TILES)
def test_the_documented_factor_bounds_the_bound(m, r):
    source, weight = torch.randn(1, 5, 12, 12), torch.randn(3, 5, r, r)
    magnitude = winograd.convolve(m, source, weight, (0, 0), (12 - r + 1, 12 - r + 1), absolute=True)
    documented = {(2, 3): 16, (4, 3): 176, (4, 5): 1565}[m, r]
    assert documented - 1 < winograd.amplification(m, r) <= documented
    assert winograd.amplification(r, m) == pytest.approx(winograd.amplification(m, r))
    per_filter = weight.double().abs().sum((1, 2, 3)).reshape(1, -1, 1, 1)
    assert (magnitude <= documented * source.abs().max() * per_filter).all()
    grad_output = torch.randn(1, 3, 13 - r, 13 - r)
    magnitude = winograd.weight_gradient(m, r, source, grad_output, (0, 0), absolute=True)
    per_channel = grad_output.double().abs().sum((0, 2, 3)).reshape(-1, 1, 1, 1)
    assert (magnitude <= documented * source.abs().max() * per_channel).all()


def alternating(tensor: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """Magnitudes of 1 whose signs make every row of a transform add up, or the sums of products cancel."""
    height, width = torch.arange(tensor.shape[2])[:, None], torch.arange(tensor.shape[3])
    return torch.ones_like(tensor) * torch.where((height + width) % 2 == 0, 1.0, -1.0 * sign)


DATA = {
    "random": lambda x, w: (x, w),
    "positive": lambda x, w: (x.abs(), w.abs()),
    "alternating": lambda x, w: (alternating(x) * (1 + x / 8), alternating(w) * (1 + w / 8)),
    "cancelling": lambda x, w: (1 + x / 1024, alternating(w) * (1 + w / 1024)),
    "a few large values": lambda x, w: (torch.where(x > 2, x * 1e6, x), torch.where(w > 2, w * 1e3, w)),
    "tiny": lambda x, w: (x * 1e-15, w * 1e-15),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("m", "r"), TILES)
@pytest.mark.parametrize("row", WINOGRAD_ROWS, ids=str)
def test_the_error_is_within_the_bound(row, m, r, data):
    case, dtype = a_case(m, r), torch.float32
    weight = torch.randn(case.weight_size, dtype=dtype)
    operand = torch.randn(case.input_size, dtype=dtype)  # of the output's size, too
    operand, weight = DATA[data](operand, weight)
    if row.direction == "forward":
        operands, truth = {"input": operand, "weight": weight}, conv2d_forward(case, operand, weight, None)
    elif row.direction == "backward_input":
        operands = {"grad_output": operand, "weight": weight}
        truth = conv2d_backward_input(case, operand, weight)
    else:
        operands = {"grad_output": operand.flip(0), "input": operand}
        truth = conv2d_backward_weight(case, operand.flip(0), operand)
    assert winograd.tile_of(row, case, dtype, CONV2D_LAYOUTS[0]) == m
    bound = winograd.bounded(row, case, dtype, CONV2D_LAYOUTS[0], truth, operands)
    problem = violation(run_conv2d(row, case, **operands), bound)
    assert problem is None, problem


@pytest.mark.parametrize("row", [row for row in WINOGRAD_ROWS if row.direction != "backward_weight"], ids=str)
def test_whole_tiles_in_the_padding(row):
    """The direct rows leave out tap columns there, and pack weights in another order."""
    case = Conv2dCase("wide", 1, 48, 20, 20, 48, 3, 3, 1, 1, *[9] * 4, 1, 1, 1)
    weight = torch.randn(case.weight_size)
    if row.direction == "forward":
        operands = {"input": torch.randn(case.input_size), "weight": weight}
        truth = conv2d_forward(case, operands["input"], weight, None)
    else:
        operands = {"grad_output": torch.randn(case.output_size), "weight": weight}
        truth = conv2d_backward_input(case, operands["grad_output"], weight)
    assert accepts(row, shape_of(case, torch.float32, CONV2D_LAYOUTS[0], allow_winograd=True))
    bound = winograd.bounded(row, case, torch.float32, CONV2D_LAYOUTS[0], truth, operands)
    problem = violation(run_conv2d(row, case, **operands), bound)
    assert problem is None, problem


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("layouts", CONV2D_LAYOUTS[:2], ids=["nchw", "nhwc"])
def test_an_image_with_infinities_changes_no_other(layouts, value):
    row, case = next(row for row in WINOGRAD_ROWS if row.direction == "forward"), a_case(4, 3, batch=3)
    input, weight = torch.randn(case.input_size), torch.randn(case.weight_size)
    weight[:, 0] = 0  # meets the infinity: NaN under its window, nothing elsewhere
    spoiled = input.clone()
    spoiled[1, 0, 4, 4] = value
    before, after = (run_conv2d(row, case, layouts, input=x, weight=weight) for x in (input, spoiled))
    assert torch.equal(before[::2], after[::2])
    truth = conv2d_forward(case, spoiled, weight, None)
    assert violation(after[1:2], Truth(truth.value[1:2], truth.magnitude[1:2], truth.roundings)) is None


def test_rows_refuse_what_is_not_allowed():
    for row in WINOGRAD_ROWS:
        shape = shape_of(a_case(4, 3), torch.float32, CONV2D_LAYOUTS[0])
        assert shape.allow_winograd and accepts(row, shape)
    assert "winograd" not in cnn_ext.explain(torch.randn(2, 48, 8, 8), torch.randn(48, 48, 3, 3), padding=1).kernel


def a_problem():
    return torch.randn(2, 48, 8, 8), torch.randn(48, 48, 3, 3)


def kernel() -> str:
    return cnn_ext.explain(*a_problem(), padding=1).kernel


def test_the_flag_as_context_and_as_setter():
    assert "winograd" not in kernel()
    with cnn_ext.flags(winograd=True):
        assert "winograd" in kernel()
        with cnn_ext.flags(winograd=False):
            assert "winograd" not in kernel()
        with cnn_ext.flags():
            assert "winograd" in kernel()
        assert "winograd" in kernel()
    assert "winograd" not in kernel()
    with pytest.raises(ZeroDivisionError), cnn_ext.flags(winograd=True):
        raise ZeroDivisionError
    assert "winograd" not in kernel()
    cnn_ext.flags(winograd=True)
    assert "winograd" in kernel()
    cnn_ext.flags(winograd=False)
    assert "winograd" not in kernel()
    with pytest.raises(TypeError, match="winograd"):
        cnn_ext.flags(winograd=1)


def test_it_is_off_by_default():
    assert policy._Allowed() == policy._Allowed(winograd=False)
    input, weight = a_problem()
    exact = cnn_ext.functional.conv2d(input, weight, padding=1)
    with cnn_ext.flags(winograd=True):
        other = cnn_ext.functional.conv2d(input, weight, padding=1)
    assert not torch.equal(exact, other)
    assert torch.equal(exact, cnn_ext.functional.conv2d(input, weight, padding=1))
    [direct, *_] = [row for row in cnn_ext.kernels() if row.name.startswith("conv2d_forward_direct_") and row.supported]
    with cnn_ext.force_kernel(direct.name):
        assert torch.equal(exact, cnn_ext.functional.conv2d(input, weight, padding=1))


@pytest.mark.parametrize("winograd_forward", [True, False])
def test_backward_is_allowed_what_forward_was(winograd_forward):
    input, weight = (t.requires_grad_() for t in a_problem())
    grad = torch.randn(2, 48, 8, 8)

    def gradients(forward: bool, backward: bool):
        with cnn_ext.flags(winograd=forward):
            output = cnn_ext.functional.conv2d(input, weight, padding=1)
        with cnn_ext.flags(winograd=backward):
            return torch.autograd.grad(output, (input, weight), grad)

    same = gradients(winograd_forward, winograd_forward)
    assert all(map(torch.equal, gradients(winograd_forward, not winograd_forward), same))
    others = gradients(not winograd_forward, not winograd_forward)
    assert not any(map(torch.equal, others, same))


def derivatives(conv2d, input, weight, bias, directions) -> tuple[torch.Tensor, ...]:
    """The gradients of one direction of the output, and those of one direction of these."""
    grad_output, *of_gradients = directions
    output = conv2d(input, weight, bias, padding=1)
    first = torch.autograd.grad(output, (input, weight, bias), grad_output, create_graph=True)
    return first + torch.autograd.grad(first[:2], (input, weight), of_gradients)


def test_gradients_of_both_orders():
    tensors = [torch.randn(*size).requires_grad_() for size in ((1, 24, 8, 8), (24, 24, 3, 3), (24,))]
    directions = [torch.randn_like(t) for t in (tensors[0], *tensors[:2])]
    with cnn_ext.flags(winograd=True):
        assert "winograd" in cnn_ext.explain(*tensors, padding=1).kernel
        got = derivatives(cnn_ext.functional.conv2d, *tensors, directions)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = derivatives(torch.nn.functional.conv2d, *exact, [t.double() for t in directions])
    largest = max(float(t.detach().abs().max()) for t in (*tensors, *directions))
    terms = max(24 * 9, 8 * 8)  # of a sum of products; the factors are those of docs/kernels/winograd.md
    bound = torch.finfo(torch.float32).eps * (24 + 6 * 6) ** 0.5 * 176 * terms * largest**2
    for name, mine, truth in zip(("input", "weight", "bias", "input again", "weight again"), got, wanted, strict=True):
        assert (mine - truth).abs().max() < bound < truth.abs().max(), name


def test_a_compiled_call_follows_the_flag():
    torch._dynamo.reset()
    input, weight = a_problem()
    call = torch.compile(lambda x, w: cnn_ext.functional.conv2d(x, w, padding=1), fullgraph=True, backend="aot_eager")
    for allow in (False, True, False):
        with cnn_ext.flags(winograd=allow):
            assert torch.equal(call(input, weight), cnn_ext.functional.conv2d(input, weight, padding=1))


@pytest.mark.parametrize("name", ["conv2d_forward", "conv2d_backward_input", "conv2d_backward_weight"])
def test_opcheck(name):
    input, weight = a_problem()
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    arguments = {
        "conv2d_forward": (input, weight, None, *geometry, True),
        "conv2d_backward_input": (input, weight, [2, 48, 8, 8], *geometry, True),
        "conv2d_backward_weight": (input, input, [48, 48, 3, 3], *geometry, False, True),
    }
    torch.library.opcheck(getattr(torch.ops.cnn_ext, name).default, arguments[name])


@pytest.mark.parametrize("pool_size", [1, 2])
def test_the_fused_convolution_follows_the_flag(pool_size):
    """Its sums are then those of the plain convolution that is allowed the same, in forward and in backward."""
    case = a_case(4, 5)
    input = torch.randn(2, case.in_channels, case.in_h, case.in_w, requires_grad=True)
    weight = torch.randn(case.out_channels, case.in_channels, 5, 5, requires_grad=True)
    with cnn_ext.flags(winograd=True):
        fused = cnn_ext.functional.conv2d_relu_max_pool2d(input, weight, padding=2, pool_size=pool_size)
        conv = cnn_ext.functional.conv2d(input, weight, padding=2)
    chain = cnn_ext.functional.max_pool2d(torch.relu(conv), pool_size)
    exact = cnn_ext.functional.conv2d_relu_max_pool2d(input, weight, padding=2, pool_size=pool_size)
    assert torch.equal(fused, chain) and not torch.equal(fused, exact)
    grad_output = torch.randn_like(fused)
    assert torch.equal(*(torch.autograd.grad(y, input, grad_output)[0] for y in (fused, chain)))
