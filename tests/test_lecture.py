"""The lecture: its walk-through runs as it stands, and its worked numbers are also NumPy's and SciPy's."""

import doctest
from pathlib import Path

import numpy
import pytest
import scipy.signal
import torch
from torch import nn

import cnn_ext

LECTURE = Path(__file__).parent.parent / "docs" / "lecture.md"
EPS = torch.finfo(torch.float64).eps


def close(got: torch.Tensor, wanted, terms: int) -> bool:
    """Within eps * terms of a sum * the largest magnitude, in float64."""
    wanted = torch.from_numpy(numpy.ascontiguousarray(wanted))
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= EPS * terms * max(1, wanted.abs().max()))


def test_examples_of_the_walk_through():
    torch.set_num_threads(1)
    failed, attempted = doctest.testfile(str(LECTURE), module_relative=False)
    assert attempted > 100
    assert failed == 0


def random_pair(*sizes):
    generator = torch.Generator().manual_seed(sum(map(sum, sizes)))
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]


@pytest.mark.parametrize("mode", ["full", "same", "valid"])
@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 3), (5, 5), (1, 1), (3, 7)])
def test_one_dimension_is_numpy(mode, n, m):
    x, w = random_pair((n,), (m,))
    assert close(cnn_ext.convolve(x, w, mode), numpy.convolve(x.numpy(), w.numpy(), mode), terms=m)
    assert close(cnn_ext.correlate(x, w, mode), numpy.correlate(x.numpy(), w.numpy(), mode), terms=m)


@pytest.mark.parametrize("mode", ["full", "same", "valid"])
@pytest.mark.parametrize(("n", "m"), [((6, 7), (3, 3)), ((6, 7), (2, 4)), ((5, 5), (5, 5)), ((4, 3), (1, 2))])
def test_two_dimensions_are_scipy(mode, n, m):
    x, w = random_pair(n, m)
    terms = m[0] * m[1]
    assert close(cnn_ext.convolve(x, w, mode), scipy.signal.convolve2d(x.numpy(), w.numpy(), mode), terms)
    assert close(cnn_ext.correlate(x, w, mode), scipy.signal.correlate2d(x.numpy(), w.numpy(), mode), terms)


def test_practical_formula_counts_from_zero():
    """Often printed with x[i + m - k], which counts from one; with indices from zero it is x[i + m - 1 - k]."""
    x, w = random_pair((9,), (4,))
    m = len(w)
    formula = [sum(x[i + m - 1 - k] * w[k] for k in range(m)) for i in range(len(x) - m + 1)]
    shifted = [sum(x[i + m - k] * w[k] for k in range(m)) for i in range(len(x) - m)]
    valid = cnn_ext.convolve(x, w, "valid")
    assert close(valid, torch.stack(formula).numpy(), terms=m)
    assert close(valid[1:], torch.stack(shifted).numpy(), terms=m)


def test_stride_two_example():
    x = torch.tensor([3, 2, 1, 7, 1, 2, 5, 4], dtype=torch.float64)
    w = torch.tensor([1 / 2, 3 / 4, 1, 1 / 4], dtype=torch.float64)
    assert cnn_ext.convolve(x, w, padding=0, stride=2).tolist() == [7.0, 9.0, 8.0]


def test_padding_and_stride_in_two_dimensions():
    x = torch.tensor([[2, 1, 2], [5, 0, 1], [1, 7, 3]], dtype=torch.float64)
    w = torch.tensor([[0.5, 0.7, 0.4], [0.3, 0.4, 0.1], [0.5, 1, 0.5]], dtype=torch.float64)
    got = cnn_ext.convolve(x, w, padding=(1, 1), stride=(2, 2))
    assert close(got, numpy.array([[4.6, 1.6], [7.5, 2.9]]), terms=9)
    assert close(got, scipy.signal.convolve2d(x.numpy(), w.numpy(), "same")[::2, ::2], terms=9)


@pytest.mark.parametrize(("n", "m", "p", "s", "size"), [(10, 5, 2, 1, 10), (10, 3, 2, 2, 6), (3, 3, 1, 2, 2)])
def test_output_size(n, m, p, s, size):
    assert cnn_ext.output_size(n, m, p, s) == size
    assert len(cnn_ext.convolve(torch.ones(n), torch.ones(m), padding=p, stride=s)) == size


@pytest.mark.parametrize(
    "arguments",
    [{"n": -1, "m": 1}, {"n": 5, "m": 0}, {"n": 5, "m": 3, "p": -1}, {"n": 5, "m": 3, "s": 0}, {"n": 3, "m": 6}],
)
def test_output_size_has_preconditions(arguments):
    with pytest.raises(ValueError, match="output_size"):
        cnn_ext.output_size(**arguments)


def test_max_pooling_is_invariant_to_what_the_maximum_hides():
    first = [[10, 255, 125, 0, 170, 100], [70, 255, 105, 25, 25, 70], [255, 0, 150, 0, 10, 10]]
    first += [[0, 255, 10, 10, 150, 20], [70, 15, 200, 100, 95, 0], [35, 25, 100, 20, 0, 60]]
    second = [[100, 100, 100, 50, 100, 50], [95, 255, 100, 125, 125, 170], [80, 40, 10, 10, 125, 150]]
    second += [[255, 30, 150, 20, 120, 125], [30, 30, 150, 100, 70, 70], [70, 30, 100, 200, 70, 95]]
    for matrix in (first, second):
        pooled = cnn_ext.MaxPool2d(2)(torch.tensor([matrix], dtype=torch.float32))
        assert pooled[0].tolist() == [[255, 125, 170], [255, 150, 150], [70, 200, 95]]


def test_losses_on_logits_and_on_probabilities():
    logit, target = torch.tensor([0.8]), torch.tensor([1.0])
    assert f"{nn.BCELoss()(torch.sigmoid(logit), target):.4f}" == "0.3711"
    assert f"{nn.BCEWithLogitsLoss()(logit, target):.4f}" == "0.3711"
    logits, target = torch.tensor([[1.5, 0.8, 2.1]]), torch.tensor([2])
    assert f"{nn.NLLLoss()(torch.log_softmax(logits, dim=1), target):.4f}" == "0.5996"
    assert f"{nn.CrossEntropyLoss()(logits, target):.4f}" == "0.5996"
