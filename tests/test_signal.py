"""convolve, correlate and output_size: NumPy's and SciPy's numbers over a grid, gradients, integers, errors."""

import itertools

import numpy
import pytest
import scipy.signal
import torch

import cnn_ext

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["full", "same", "valid"]
EPS = torch.finfo(torch.float64).eps


def assert_near(got, wanted, terms):
    """Within eps * terms * 10, products of normal numbers being below 10 here."""
    assert got.shape == wanted.shape
    assert abs(got.numpy() - wanted).max() <= EPS * terms * 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["convolve", "correlate"])
def test_one_dimension_is_numpy(name, mode):
    for n, m in itertools.product([1, 2, 3, 4, 7], repeat=2):
        x, w = torch.randn(n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
        wanted = getattr(numpy, name)(x.numpy(), w.numpy(), mode)
        assert_near(getattr(cnn_ext, name)(x, w, mode), wanted, terms=min(n, m))
        assert_near(getattr(cnn_ext, name)(x, w, mode, stride=2), wanted[::2], terms=min(n, m))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["convolve", "correlate"])
def test_two_dimensions_are_scipy(name, mode):
    sizes = [(1, 1), (3, 4), (4, 2), (5, 5)]
    for x_size, w_size in itertools.product(sizes, repeat=2):
        x, w = torch.randn(x_size, dtype=torch.float64), torch.randn(w_size, dtype=torch.float64)
        try:
            wanted = getattr(scipy.signal, f"{name}2d")(x.numpy(), w.numpy(), mode)
        except ValueError:
            with pytest.raises(ValueError, match="every dimension"):
                getattr(cnn_ext, name)(x, w, mode)
            continue
        assert_near(getattr(cnn_ext, name)(x, w, mode), wanted, terms=min(x.numel(), w.numel()))
        assert_near(getattr(cnn_ext, name)(x, w, mode, stride=(2, 3)), wanted[::2, ::3], terms=25)


def test_padding_overrides_the_mode():
    x, w = torch.randn(8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for p in range(4):
        wanted = numpy.convolve(numpy.pad(x.numpy(), p), w.numpy(), "valid")
        assert_near(cnn_ext.convolve(x, w, "full", padding=p), wanted, terms=3)
        got = cnn_ext.correlate(x, w, padding=p, stride=2)
        assert_near(got, numpy.correlate(numpy.pad(x.numpy(), p), w.numpy(), "valid")[::2], terms=3)
        assert len(got) == cnn_ext.output_size(8, 3, p, 2)


@pytest.mark.parametrize("sizes", [[(6,), (3,)], [(2,), (5,)], [(4, 5), (2, 3)]], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["convolve", "correlate"])
def test_gradients(name, mode, sizes):
    operands = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda x, w: getattr(cnn_ext, name)(x, w, mode), operands)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_integers_wrap_as_numpys(dtype):
    x, w = torch.tensor([100, 2, 3, 120]).to(dtype), torch.tensor([2, 1, 3]).to(dtype)
    got = cnn_ext.convolve(x, w)
    assert got.dtype == dtype
    assert numpy.array_equal(got.numpy(), numpy.convolve(x.numpy(), w.numpy()))


def test_integers_that_float64_cannot_hold_are_refused():
    with pytest.raises(RuntimeError, match=r"2\*\*53"):
        cnn_ext.convolve(torch.tensor([2**40]), torch.tensor([2**14]))


def test_dtypes_are_promoted():
    assert cnn_ext.convolve(torch.tensor([1, 2]), torch.tensor([0.5])).dtype == torch.float32
    assert cnn_ext.convolve(torch.tensor([1.0]), torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float64


def test_output_size_is_the_length():
    for n, m, p, s, d in itertools.product(range(1, 8), range(1, 4), range(3), range(1, 4), (1, 2)):
        if d * (m - 1) + 1 > n + 2 * p:
            with pytest.raises(ValueError, match="fits"):
                cnn_ext.output_size(n, m, p, s, d)
            continue
        wanted = torch.nn.functional.conv1d(torch.zeros(1, 1, n), torch.zeros(1, 1, m), stride=s, padding=p, dilation=d)
        assert cnn_ext.output_size(n, m, p, s, d) == wanted.shape[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, 3, 0, 0), ValueError, "s of at least 1"),
        ((5, 0), ValueError, "m of at least 1"),
        ((5, 3, -1), ValueError, "p of at least 0"),
        ((-1, 3), ValueError, "n of at least 0"),
        ((5, 3, 0, 1, 0), ValueError, "dilation of at least 1"),
        ((5, 3.0), TypeError, "'m'"),
    ],
)
def test_output_size_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        cnn_ext.output_size(*arguments)


@pytest.mark.parametrize(
    ("x", "w", "arguments", "error", "message"),
    [
        (torch.ones(3), torch.ones(0), {}, ValueError, "w not to be empty"),
        (torch.ones(0), torch.ones(3), {}, ValueError, "x not to be empty"),
        (torch.ones(3), torch.ones(2, 2), {}, RuntimeError, "one rank"),
        (torch.ones(1, 1, 1), torch.ones(1), {}, RuntimeError, "1-D or 2-D"),
        ([1, 2], torch.ones(1), {}, TypeError, "'x' must be Tensor"),
        (torch.ones(3), torch.ones(2, dtype=torch.bool), {}, TypeError, "bool"),
        (torch.ones(3), torch.ones(2), {"mode": "SAME"}, ValueError, "mode"),
        (torch.ones(3), torch.ones(2), {"stride": 0}, ValueError, "stride"),
        (torch.ones(3), torch.ones(2), {"stride": (1, 2)}, RuntimeError, "stride"),
        (torch.ones(3), torch.ones(2), {"padding": -1}, ValueError, "padding"),
        (torch.ones(3), torch.ones(6), {"padding": 1}, ValueError, "fit"),
    ],
)
def test_errors(x, w, arguments, error, message):
    for function in (cnn_ext.convolve, cnn_ext.correlate):
        with pytest.raises(error, match=message):
            function(x, w, **arguments)
