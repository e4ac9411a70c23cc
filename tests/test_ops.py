"""The raw operators: torch's own checks of schema, fake kernel and tracing, and what their fakes say of strides."""

import re

import pytest
import torch

import cnn_ext

OPS = torch.ops.cnn_ext
GEOMETRIES = [
    ((1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((2, 1), (1, 0, 2, 1), (1, 2), 2),
]
WINDOWS = [((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), False), ((3, 2), (1, 2), (1, 1, 0, 1), (2, 1), True)]
POOLS = [((1, 1), (1, 1)), ((2, 2), (2, 1))]
FORMATS = [torch.contiguous_format, torch.channels_last]


def conv2d_arguments(geometry, format, weight_format):
    """Arguments of every operator on one problem."""
    input = torch.randn(2, 4, 9, 8).contiguous(memory_format=format)
    weight = torch.randn(6, 4 // geometry[3], 3, 2).contiguous(memory_format=weight_format)
    output = OPS.conv2d_forward(input, weight, None, *geometry)
    return {
        "conv2d_forward": (input, weight, torch.randn(6), *geometry),
        "conv2d_backward_input": (output, weight, list(input.shape), *geometry),
        "conv2d_backward_weight": (
            output,
            input,
            list(weight.shape),
            *geometry,
            weight_format == torch.channels_last,
        ),
        "conv2d_backward_bias": (output,),
        "conv_transpose2d_forward": (output, weight, torch.randn(4), list(input.shape), *geometry),
    }


def fused_arguments(geometry, pool, format, weight_format):
    """Arguments of all four fused operators on one problem."""
    input = torch.randn(2, 4, 9, 8).contiguous(memory_format=format)
    weight = torch.randn(6, 4 // geometry[3], 3, 2).contiguous(memory_format=weight_format)
    output, offsets = OPS.conv2d_relu_max_pool2d_forward(input, weight, None, *geometry, *pool, True)
    mask = offsets if offsets.numel() else output.clone()
    last = weight_format == torch.channels_last
    return {
        "conv2d_relu_max_pool2d_forward": (input, weight, torch.randn(6), *geometry, *pool, True),
        "conv2d_relu_max_pool2d_backward_input": (output, mask, weight, list(input.shape), *geometry, *pool),
        "conv2d_relu_max_pool2d_backward_weight": (output, mask, input, list(weight.shape), *geometry, *pool, last),
        "conv2d_relu_max_pool2d_backward_bias": (output, mask, *pool),
    }


def pool2d_arguments(window, format):
    input = torch.randn(2, 3, 9, 8).contiguous(memory_format=format)
    output, offsets = OPS.max_pool2d_forward(input, *window, True)
    size = list(input.shape)
    return {
        "max_pool2d_forward": (input, *window, True),
        "max_pool2d_backward": (output, offsets, size, *window),
        "max_pool2d_gather": (input, offsets, *window),
        "avg_pool2d_forward": (input, *window, False, None),
        "avg_pool2d_backward": (output, size, *window, True, 3),
    }


def sized_pool2d_arguments(format):
    input = torch.randn(2, 3, 9, 8).contiguous(memory_format=format)
    output, indices = OPS.adaptive_max_pool2d_forward(input, (4, 3), True)
    return {
        "adaptive_max_pool2d_forward": (input, (4, 3), True),
        "adaptive_avg_pool2d_forward": (input, (4, 3)),
        "adaptive_avg_pool2d_backward": (output, list(input.shape)),
        "max_unpool2d_forward": (output, indices, (9, 8)),
        "max_unpool2d_scatter": (output, indices, (9, 8)),
        "max_unpool2d_gather": (input, indices),
    }


@pytest.mark.parametrize("name", list(conv2d_arguments(GEOMETRIES[0], *FORMATS)))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["plain", "all arguments"])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_conv2d(name, geometry, format, weight_format):
    torch.library.opcheck(getattr(OPS, name).default, conv2d_arguments(geometry, format, weight_format)[name])


@pytest.mark.parametrize("name", list(fused_arguments(GEOMETRIES[0], POOLS[0], *FORMATS)))
@pytest.mark.parametrize("pool", POOLS, ids=["relu alone", "pool"])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_fused(name, pool, format, weight_format):
    arguments = fused_arguments(GEOMETRIES[1], pool, format, weight_format)[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", list(pool2d_arguments(WINDOWS[0], FORMATS[0])))
@pytest.mark.parametrize("window", WINDOWS, ids=["plain", "all arguments"])
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_pool2d(name, window, format):
    torch.library.opcheck(getattr(OPS, name).default, pool2d_arguments(window, format)[name])


@pytest.mark.parametrize("name", list(sized_pool2d_arguments(FORMATS[0])))
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_sized_pool2d(name, format):
    torch.library.opcheck(getattr(OPS, name).default, sized_pool2d_arguments(format)[name])


def test_every_operator_is_checked():
    checked = {
        *conv2d_arguments(GEOMETRIES[0], *FORMATS),
        *fused_arguments(GEOMETRIES[0], POOLS[0], *FORMATS),
        *pool2d_arguments(WINDOWS[0], FORMATS[0]),
        *sized_pool2d_arguments(FORMATS[0]),
    }
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "cnn_ext" in name
    }
    assert registered == checked


def test_without_offsets_none_are_computed():
    output, offsets = OPS.max_pool2d_forward(torch.randn(1, 1, 4, 4), *WINDOWS[0], False)
    assert output.shape == (1, 1, 2, 2)
    assert offsets.numel() == 0


def test_a_mode_sees_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    with Recorder():
        cnn_ext.functional.conv2d(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3))
    assert "cnn_ext.conv2d_forward.default" in seen


def test_a_profile_names_the_operator():
    with torch.profiler.profile() as profile:
        cnn_ext.functional.max_pool2d(torch.randn(1, 1, 4, 4), 2)
    assert "cnn_ext::max_pool2d_forward" in {event.name for event in profile.events()}


def test_meta_tensors_have_the_shape_of_the_result():
    output = cnn_ext.functional.conv2d(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta"))
    assert output.shape == (2, 4, 6, 6) and output.is_meta


CALLS = {
    "conv2d": lambda module, input, weight, bias: module.conv2d(input, weight, bias),
    "conv_transpose2d": lambda module, input, weight, bias: module.conv_transpose2d(input, weight, bias),
    "max_pool2d": lambda module, input, weight, bias: module.max_pool2d(input, 2),
    "avg_pool2d": lambda module, input, weight, bias: module.avg_pool2d(input, 2),
    "adaptive_avg_pool2d": lambda module, input, weight, bias: module.adaptive_avg_pool2d(input, 2),
}
OPERAND_SIZES = [(2, 4, 6, 6), (4, 4, 3, 3), (4,)]


@pytest.mark.parametrize(
    ("name", "operand"), [(name, operand) for name in CALLS for operand in range(1 if "pool" in name else 3)]
)
def test_a_tensor_without_memory_is_refused(name, operand):
    operands = [torch.randn(size) for size in OPERAND_SIZES]
    operands[operand].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=re.escape(f"one of size {list(OPERAND_SIZES[operand])} has none")):
        CALLS[name](cnn_ext.functional, *operands)


@pytest.mark.parametrize("name", CALLS)
def test_zeros_without_memory_are_zeros(name):
    """What torch has for tangents that vanish."""
    for operand, size in enumerate(OPERAND_SIZES):
        operands = [torch.randn(size) for size in OPERAND_SIZES]
        operands[operand] = torch._efficientzerotensor(size)
        got, wanted = (CALLS[name](module, *operands) for module in (cnn_ext.functional, torch.nn.functional))
        torch.testing.assert_close(got, wanted)


def test_an_input_without_elements_has_no_memory():
    assert cnn_ext.functional.conv2d(torch.empty(0, 4, 6, 6), torch.randn(4, 4, 3, 3)).shape == (0, 4, 4, 4)


def test_memory_that_holds_the_negative_is_written_out():
    """torch leaves the sign of ``x.conj().imag`` to be applied later; one element is dense in any layout."""
    weight = torch.full((1, 1, 1, 1), 1 + 2j).conj().imag
    input = torch._neg_view(torch.randn(1, 1, 4, 4))
    assert weight.is_neg() and input.is_neg()
    for function in (
        lambda module: module.conv2d(input, weight),
        lambda module: module.conv2d(torch.ones(1, 1, 4, 4), weight, torch._neg_view(torch.ones(1))),
        lambda module: module.conv_transpose2d(input, weight),
        lambda module: module.max_pool2d(input, 2),
        lambda module: module.avg_pool2d(input, 2),
        lambda module: module.adaptive_avg_pool2d(input, 3),
    ):
        torch.testing.assert_close(function(cnn_ext.functional), function(torch.nn.functional))
