"""The raw operator of the transposed convolution, without autograd: the gradient of a convolution's input, plus a bias.

Its arguments have the names that they have for that convolution: ``grad_output`` [N, K, OH, OW] is what is transposed,
``input_size`` [N, C, H, W] the size of the result, ``input_bias`` [C] is added to it. The geometry is the
convolution's; negative padding behind the input is output padding.
"""

from cnn_ext import _native
from cnn_ext.ops import shapes
from cnn_ext.ops.conv2d import GEOMETRY, POLICY, plan_backward_input, prepare_backward_input
from cnn_ext.ops.library import register
from cnn_ext.ops.results import empty
from cnn_ext.ops.shapes import TensorSpec, spec


def _check_bias(grad_output: TensorSpec, bias: TensorSpec | None, input_size) -> None:
    if bias is not None:
        shapes.check_same_type(grad_output, bias, ("grad_output", "input_bias"))
        shapes.check_size("input_bias", bias.size, (input_size[1],))


def _forward(grad_output, weight, input_bias, input_size, stride, padding, dilation, groups, allow_winograd=False):
    _check_bias(spec(grad_output), None if input_bias is None else spec(input_bias), input_size)
    shape, memory_format, weight_format = prepare_backward_input(
        spec(grad_output),
        spec(weight),
        input_size,
        (stride, padding, dilation, groups),
        allow_winograd,
    )
    grad_input = empty(input_size, grad_output, memory_format)
    if grad_input.numel() != 0:
        grad_output = grad_output.contiguous(memory_format=memory_format)
        weight = weight.contiguous(memory_format=weight_format)
        bias = None if input_bias is None else input_bias.contiguous()
        _native.conv_transpose2d_forward(shape, grad_output, weight, bias, grad_input)
    return grad_input


def _forward_fake(grad_output, weight, input_bias, input_size, stride, padding, dilation, groups, allow_winograd=False):
    _check_bias(spec(grad_output), None if input_bias is None else spec(input_bias), input_size)
    geometry = (stride, padding, dilation, groups)
    memory_format = plan_backward_input(spec(grad_output), spec(weight), input_size, geometry)
    return empty(input_size, grad_output, memory_format)


conv_transpose2d_forward = register(
    "conv_transpose2d_forward(Tensor grad_output, Tensor weight, Tensor? input_bias, SymInt[4] input_size, "
    f"{GEOMETRY}, {POLICY}) -> Tensor",
    _forward,
    _forward_fake,
)
