"""torch.func: vmap in one call of a kernel, reverse and forward mode and what is made of them, against torch's own."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function, forward_ad, gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import cnn_ext.functional as C
from cnn_ext import _native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:There is a performance drop"),  # torch.vmap's loop
]

GEOMETRY = {"stride": (2, 1), "padding": 1}


def convolutions(module, groups):
    """Functions of (input, weight, bias), as this package or torch has them."""
    arguments = GEOMETRY | {"groups": groups}
    transposed = {"conv_transpose2d": lambda *tensors: module.conv_transpose2d(*tensors, **arguments)}
    if module is C:
        return transposed | {
            "conv2d": lambda *tensors: C.conv2d(*tensors, **arguments),
            "conv2d with relu": lambda *tensors: C.conv2d(*tensors, **arguments, activation="relu"),
            "conv2d_relu_max_pool2d": lambda *tensors: C.conv2d_relu_max_pool2d(*tensors, **arguments),
        }
    return transposed | {
        "conv2d": lambda *tensors: F.conv2d(*tensors, **arguments),
        "conv2d with relu": lambda *tensors: F.conv2d(*tensors, **arguments).relu(),
        "conv2d_relu_max_pool2d": lambda *tensors: F.max_pool2d(F.conv2d(*tensors, **arguments).relu(), 2),
    }


def poolings(module):
    return {
        "max_pool2d": lambda input: module.max_pool2d(input, 3, 2, 1),
        "max_pool2d of ceil_mode": lambda input: module.max_pool2d(input, 2, ceil_mode=True),
        "avg_pool2d": lambda input: module.avg_pool2d(input, 2, 1, 1, count_include_pad=False),
    }


def operands(groups=1):
    sizes = (2, 4, 5, 4), (4, 4 // groups, 3, 2), (4,)
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def assert_close(got, wanted, *, terms=1000):
    """Sums of up to ``terms`` products in float64, relative to the largest result."""
    if isinstance(wanted, torch.Tensor):
        tolerance = torch.finfo(torch.float64).eps * terms * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    else:
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other, terms=terms)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The names of the kernels' entry points, as they are called."""
    calls = []
    for name in [
        name
        for name in vars(_native)
        if name.startswith(("conv2d_", "conv_transpose2d_", "max_pool2d_", "avg_pool2d_"))
    ]:
        kernel = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    return calls


MAPPED = [dims for dims in itertools.product((None, 1), (None, 2), (None, 0)) if dims != (None, None, None)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", convolutions(C, 1))
@pytest.mark.parametrize("in_dims", MAPPED, ids=str)
def test_vmap_of_a_convolution(in_dims, name, groups, kernel_calls):
    stacked = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, 1 - tensor], dim)
        for tensor, dim in zip(operands(groups), in_dims, strict=True)
    ]
    ours, torchs = convolutions(C, groups)[name], convolutions(F, groups)[name]
    assert_close(vmap(ours, in_dims)(*stacked), vmap(torchs, in_dims)(*stacked))
    assert len(kernel_calls) == 1
    of_all = [
        vmap(grad(lambda *t, f=function: f(*t).square().sum(), argnums=(0, 1, 2)), in_dims)
        for function in (ours, torchs)
    ]
    assert_close(of_all[0](*stacked), of_all[1](*stacked))
    assert len(kernel_calls) == 5  # and forward with its three gradients


@pytest.mark.parametrize("name", poolings(C))
def test_vmap_of_a_pooling(name, kernel_calls):
    stacked = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    ours, torchs = poolings(C)[name], poolings(F)[name]
    assert_close(vmap(ours, 2)(stacked), vmap(torchs, 2)(stacked))
    gradients = [vmap(grad(lambda t, f=function: f(t).square().sum()), 1)(stacked) for function in (ours, torchs)]
    assert_close(*gradients)
    assert len(kernel_calls) == 3


def test_vmap_of_channels_last():
    stacked = torch.stack([t.contiguous(memory_format=torch.channels_last) for t in torch.randn(3, 2, 4, 5, 6)])

    def loss(function):
        return lambda input: function(input, 2).square().sum()

    assert torch.equal(vmap(grad(loss(C.max_pool2d)))(stacked), vmap(grad(loss(F.max_pool2d)))(stacked))


def test_nested_vmap(kernel_calls):
    input, weight, bias = operands()
    weights = torch.randn(2, 3, *weight.shape, dtype=torch.float64)
    nested = [vmap(vmap(lambda w, f=function: f(input, w, bias)))(weights) for function in (C.conv2d, F.conv2d)]
    assert_close(*nested)
    assert len(kernel_calls) == 1


def loss(module):
    def compute(weight, bias, image):
        hidden = module.max_pool2d(module.conv2d(image[None], weight, bias, padding=1).tanh(), 2)
        return module.avg_pool2d(hidden, 1).square().sum()

    return compute


def test_per_sample_gradients_are_one_call_of_a_kernel(kernel_calls):
    input, weight, bias = operands()
    got = vmap(grad(loss(C), argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, input)
    assert kernel_calls.count("conv2d_backward_weight") == kernel_calls.count("conv2d_backward_bias") == 1
    wanted = [grad(loss(F), argnums=(0, 1))(weight, bias, image) for image in input]
    assert_close(got, [torch.stack(grads) for grads in zip(*wanted, strict=True)])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_conv2d_weight_per_sample(batch, groups, kernel_calls):
    _, weight, _ = operands(groups)
    input = torch.randn(batch, 4, 5, 4, dtype=torch.float64)
    arguments = GEOMETRY | {"groups": groups}
    grad_output = torch.randn_like(F.conv2d(input, weight, **arguments))
    got = C.conv2d_weight_per_sample(input, weight.shape, grad_output, **arguments)
    assert got.shape == (batch, *weight.shape)
    assert kernel_calls == ["conv2d_backward_weight"] * min(batch, 1)
    for image, grad_image, of_image in zip(input, grad_output, got, strict=True):
        wanted = torch.nn.grad.conv2d_weight(image[None], weight.shape, grad_image[None], **arguments)
        assert_close(of_image, wanted)
    if batch == 3:
        tensors = input.requires_grad_(), grad_output.requires_grad_()
        assert gradcheck(lambda x, g: C.conv2d_weight_per_sample(x, weight.shape, g, **arguments), tensors)


@pytest.mark.parametrize(
    ("input", "weight_size", "grad_output", "message"),
    [
        ((3, 4, 4), (1, 3, 1, 1), (1, 1, 4, 4), "Expected 4D input"),
        ((1, 3, 4, 4), (1, 3, 1), (1, 1, 4, 4), "Expected 4D weight"),
        ((2, 3, 4, 4), (1, 3, 1, 1), (1, 1, 4, 4), "grad_output of 2 images, but got 1"),
        ((2, 3, 4, 4), (1, 3, 1, 1), (2, 1, 4, 3), "Expected grad_output of size"),
    ],
)
def test_conv2d_weight_per_sample_refuses(input, weight_size, grad_output, message):
    with pytest.raises(RuntimeError, match=message):
        C.conv2d_weight_per_sample(torch.randn(input), weight_size, torch.randn(grad_output))


def differentiable_functions(module):
    functions = {name: (function, operands()) for name, function in convolutions(module, 1).items()}
    input = torch.randperm(2 * 3 * 5 * 6).double().reshape(2, 3, 5, 6) / 8
    return functions | {name: (function, [input]) for name, function in poolings(module).items()}


@pytest.fixture(params=differentiable_functions(C))
def pair(request):
    """This package's function, torch's, and tensors for both."""
    torch.manual_seed(0)
    ours, tensors = differentiable_functions(C)[request.param]
    return ours, differentiable_functions(F)[request.param][0], tensors


def subsets(tensors):
    """Each tensor by itself, and all together."""
    everything = tuple(range(len(tensors)))
    return [(i,) for i in everything] + ([everything] if len(everything) > 1 else [])


def as_function_of(function, tensors, chosen):
    """``function`` with all but the chosen tensors fixed."""

    def partial(*values):
        arguments = list(tensors)
        for i, value in zip(chosen, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    return partial, [tensors[i] for i in chosen]


def test_jvp_and_vjp(pair):
    ours, torchs, tensors = pair
    for chosen in subsets(tensors):
        (ours_of, values), (torchs_of, _) = (as_function_of(f, tensors, chosen) for f in (ours, torchs))
        tangents = tuple(torch.randn_like(value) for value in values)
        assert_close(jvp(ours_of, tuple(values), tangents), jvp(torchs_of, tuple(values), tangents))
        output, ours_pullback = vjp(ours_of, *values)
        _, torchs_pullback = vjp(torchs_of, *values)
        cotangent = torch.randn_like(output)
        assert_close(ours_pullback(cotangent), torchs_pullback(cotangent))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_in_eager_mode(pair, requires_grad):
    ours, torchs, tensors = pair
    for chosen in subsets(tensors):
        (ours_of, values), (torchs_of, _) = (as_function_of(f, tensors, chosen) for f in (ours, torchs))
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(value.clone().requires_grad_(requires_grad), torch.randn_like(value))
                for value in values
            ]
            assert_close(*(forward_ad.unpack_dual(f(*duals))[:2] for f in (ours_of, torchs_of)))


@pytest.mark.parametrize("jacobian", [jacfwd, jacrev])
def test_jacobian(pair, jacobian):
    ours, torchs, tensors = pair
    argnums = tuple(range(len(tensors)))
    assert_close(jacobian(ours, argnums)(*tensors), jacobian(torchs, argnums)(*tensors))


@pytest.mark.parametrize("second", [hessian, lambda f: jacrev(jacfwd(f)), lambda f: jacrev(jacrev(f))])
def test_hessian(pair, second):
    ours, torchs, tensors = pair
    for i in range(len(tensors)):
        (ours_of, values), (torchs_of, _) = (as_function_of(f, tensors, (i,)) for f in (ours, torchs))
        assert_close(*(second(lambda t, f=function: f(t).pow(3).sum())(*values) for function in (ours_of, torchs_of)))


def test_forward_mode_within_forward_mode_is_refused():
    _, weight, _ = operands()
    with pytest.raises(NotImplementedError, match=r"jacfwd\(jacrev\(f\)\)"):
        jacfwd(jacfwd(lambda w: C.conv2d(torch.ones(1, 4, 4, 4).double(), w).square().sum()))(weight)


def functions_of(module):
    return [f for f in vars(module).values() if isinstance(f, type) and issubclass(f, Function) and f is not Function]


def test_every_function_and_every_operator_has_its_rules():
    modules = [module for name, module in sys.modules.items() if name.startswith("cnn_ext.autograd.")]
    functions = [function for module in modules for function in functions_of(module)]
    assert len(functions) >= 13
    assert not [function.__name__ for function in functions if function.jvp is Function.jvp]
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cnn_ext::")]
    assert operators
    for name in operators:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched"), name
