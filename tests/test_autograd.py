"""Gradients of every order, and what a call saves and computes for each subset of inputs that require them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import cnn_ext.functional as C
from cnn_ext import _native

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "padding": 1},
    "grouped": {"groups": 2, "padding": ((1, 0), (0, 2))},
}
FORMATS = [torch.contiguous_format, torch.channels_last]


def operands(groups=1, format=torch.contiguous_format, dtype=torch.float64):
    sizes = [(2, 4, 5, 6), (4, 4 // groups, 3, 2), (4,)]
    input, weight, bias = (torch.randn(size, dtype=dtype) for size in sizes)
    return [t.requires_grad_() for t in (input.contiguous(memory_format=format), weight, bias)]


def distinct(*size, format=torch.contiguous_format):
    """Values a gap apart, so that a finite difference does not change which one is the largest."""
    values = torch.randperm(torch.Size(size).numel()).double().reshape(size) / 8
    return values.contiguous(memory_format=format).requires_grad_()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv2d(geometry, format):
    arguments = GEOMETRIES[geometry]
    inputs = operands(arguments.get("groups", 1), format)

    def conv2d(*tensors):
        return C.conv2d(*tensors, **arguments)

    assert gradcheck(conv2d, inputs, nondet_tol=0)
    assert gradgradcheck(conv2d, inputs, nondet_tol=0)


POOLS = {
    "max": lambda x: C.max_pool2d(x, 2),
    "max overlapping": lambda x: C.max_pool2d(x, 3, (1, 2), 1, ceil_mode=True),
    "max dilated": lambda x: C.max_pool2d(x, 2, 1, 1, 2),
    "avg": lambda x: C.avg_pool2d(x, 2),
    "avg overlapping": lambda x: C.avg_pool2d(x, 3, (1, 2), 1, True, False),
    "avg divisor": lambda x: C.avg_pool2d(x, (2, 3), 1, 1, divisor_override=-3, dilation=2),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pool", POOLS)
def test_pool2d(pool, format):
    input = distinct(2, 2, 5, 6, format=format)
    assert gradcheck(POOLS[pool], input, nondet_tol=0)
    assert gradgradcheck(POOLS[pool], input, nondet_tol=0)


def nested_gradients(functions, tensors, order):
    """The gradients of a nonlinear scalar of a small CNN, ``order`` times nested."""
    conv2d, max_pool2d, avg_pool2d = functions
    input, weight, bias = tensors
    value = avg_pool2d(max_pool2d(conv2d(input, weight, bias, padding=1).tanh(), 2, 1), 2).pow(3).sum()
    for _ in range(order):
        grads = torch.autograd.grad(value, tensors, create_graph=True)
        value = sum(grad.pow(2).sum() for grad in grads)
    return [grad.detach() for grad in grads]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_nested_gradients_are_torchs(order):
    ours = nested_gradients((C.conv2d, C.max_pool2d, C.avg_pool2d), operands(), order)
    torch.manual_seed(0)
    tensors = operands()
    for got, wanted in zip(
        nested_gradients((C.conv2d, C.max_pool2d, C.avg_pool2d), tensors, order),
        nested_gradients((F.conv2d, F.max_pool2d, F.avg_pool2d), tensors, order),
        strict=True,
    ):
        # A gradient of order n passes through n + 1 sums of up to 100 terms.
        tolerance = torch.finfo(torch.float64).eps * 100 * (order + 1) * wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    assert len(ours) == 3


def saved_by(call):
    """The tensors that ``call`` keeps for its backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = call()
    return output, saved


SUBSETS = [subset for subset in itertools.product([False, True], repeat=3) if any(subset)]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(n for n, on in zip("xwb", s, strict=True) if on))
def test_conv2d_saves_and_computes_what_is_asked_for(subset, monkeypatch):
    tensors = [t.detach().requires_grad_(on) for t, on in zip(operands(), subset, strict=True)]
    input, weight, _ = tensors
    output, saved = saved_by(lambda: C.conv2d(*tensors))
    wanted = ([input] if subset[1] else []) + ([weight] if subset[0] else [])
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in wanted]
    computed = []
    for direction in ("backward_input", "backward_weight", "backward_bias"):
        kernel = getattr(_native, f"conv2d_{direction}")
        monkeypatch.setattr(
            _native, f"conv2d_{direction}", lambda *a, d=direction, k=kernel: computed.append(d) or k(*a)
        )
    output.sum().backward()
    names = ("backward_input", "backward_weight", "backward_bias")
    assert computed == [name for name, on in zip(names, subset, strict=True) if on]
    reference = [t.detach().requires_grad_(on) for t, on in zip(tensors, subset, strict=True)]
    F.conv2d(*reference).sum().backward()
    for ours, torchs in zip(tensors, reference, strict=True):
        assert (ours.grad is None) == (torchs.grad is None)
        if ours.grad is not None:  # sums of at most 40 products of a few units
            torch.testing.assert_close(ours.grad, torchs.grad, rtol=0, atol=torch.finfo(torch.float64).eps * 40 * 10)


FUNCTIONS = {
    "conv2d": C.conv2d,
    "conv_transpose2d": C.conv_transpose2d,
    "conv2d_relu_max_pool2d": lambda *tensors: C.conv2d_relu_max_pool2d(*tensors, pool_size=2),
}
_GRADIENTS = {  # of input, weight and bias: the operators that compute them
    "conv2d": ("conv2d_backward_input", "conv2d_backward_weight", "conv2d_backward_bias"),
    "conv_transpose2d": ("conv2d_forward", "conv2d_backward_weight", "conv2d_backward_bias"),
    "conv2d_relu_max_pool2d": tuple(f"conv2d_relu_max_pool2d_backward_{of}" for of in ("input", "weight", "bias")),
}


class Operators(TorchDispatchMode):
    """The names of this package's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "cnn_ext":
            self.names.append(operator.name().removeprefix("cnn_ext::"))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "results"])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(n for n, on in zip("xwb", s, strict=True) if on))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_that_a_backward_pass_leaves_out_are_not_computed(function, subset, leaves):
    """All three require gradients; torch.autograd.grad is asked for some."""
    tensors = [tensor if leaves else tensor * 1 for tensor in operands()]
    output = FUNCTIONS[function](*tensors).sum()
    every_gradient = torch.autograd.grad(output, tensors, retain_graph=True)
    with Operators() as operators:
        gradients = torch.autograd.grad(output, list(itertools.compress(tensors, subset)))
    assert operators.names == list(itertools.compress(_GRADIENTS[function], subset))
    for gradient, wanted in zip(gradients, itertools.compress(every_gradient, subset), strict=True):
        assert torch.equal(gradient, wanted)


def test_torch_refuses_to_tell_of_a_leaf_once_a_pass(monkeypatch):
    """Its refusal takes as long as a small kernel: four layers must not meet it four times."""
    will_execute, refusals = torch._C._will_engine_execute_node, []

    def count(node):
        try:
            return will_execute(node)
        except RuntimeError:
            refusals.append(node)
            raise

    monkeypatch.setattr(torch._C, "_will_engine_execute_node", count)
    layers = [(torch.randn(2, 2, 3, 3, requires_grad=True), torch.randn(2, requires_grad=True)) for _ in range(4)]
    weights = [weight for weight, _ in layers]
    output = input = torch.randn(1, 2, 6, 6, requires_grad=True)
    for weight, bias in layers:
        output = C.conv2d(output, weight, bias, padding=1)
    for asked, places in (([input], 1), (weights, 1), ([*weights, input], 2)):
        refusals.clear()
        torch.autograd.grad(output.sum(), asked, retain_graph=True)
        assert len(refusals) == places


@pytest.mark.parametrize("operand", [0, 1], ids=["input", "weight"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_gradients_that_are_left_out_are_not_computed(function, operand):
    """A gradient penalty: one gradient of ``operand`` alone, then the gradients of its square."""
    tensors = operands()
    penalty = torch.autograd.grad(FUNCTIONS[function](*tensors).square().sum(), tensors[operand], create_graph=True)[0]
    penalty = penalty.square().sum()
    both = torch.autograd.grad(penalty, tensors[:2], retain_graph=True)
    for i in range(2):
        with Operators() as operators:
            (alone,) = torch.autograd.grad(penalty, tensors[i], retain_graph=True)
        with Operators() as operators_of_both:
            torch.autograd.grad(penalty, tensors[:2], retain_graph=True)
        assert torch.equal(alone, both[i])
        assert len(operators.names) < len(operators_of_both.names)


@pytest.mark.parametrize(("kernel_size", "dtype"), [(2, torch.uint8), (16, torch.uint8), (17, torch.int32)])
def test_max_pool2d_saves_small_offsets_alone(kernel_size, dtype):
    input = torch.randn(1, 2, 34, 34, requires_grad=True)
    output, saved = saved_by(lambda: C.max_pool2d(input, kernel_size))
    assert [(t.dtype, t.shape) for t in saved] == [(dtype, output.shape)]


def test_avg_pool2d_saves_nothing():
    assert saved_by(lambda: C.avg_pool2d(torch.randn(1, 2, 8, 8, requires_grad=True), 2))[1] == []


@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "no gradient required"])
def test_no_offsets_without_backward(why, monkeypatch):
    given = []
    kernel = _native.max_pool2d_forward
    monkeypatch.setattr(_native, "max_pool2d_forward", lambda *a: given.append(a[-1]) or kernel(*a))
    input = torch.randn(1, 2, 8, 8, requires_grad=why != "no gradient required")
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, torch.enable_grad)():
        C.max_pool2d(input, 2)
    assert given == [None]


def test_a_tensor_as_input_and_weight_gets_both_gradients():
    tensor = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(C.conv2d(tensor, tensor, padding=1).square().sum(), tensor)
    (wanted,) = torch.autograd.grad(F.conv2d(tensor, tensor, padding=1).square().sum(), tensor)
    tolerance = torch.finfo(torch.float64).eps * 36 * wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def test_a_changed_operand_is_noticed():
    tensors = operands()
    output = C.conv2d(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    tensors = operands()
    direct = torch.autograd.grad(C.max_pool2d(C.conv2d(*tensors), 2).square().sum(), tensors)
    output = checkpoint(lambda *t: C.max_pool2d(C.conv2d(*t), 2), *tensors, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(output.square().sum(), tensors), direct, strict=True):
        assert torch.equal(got, wanted)
