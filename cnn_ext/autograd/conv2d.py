"""The convolution with gradients of every order.

Convolution is linear in the input and in the weight, so the derivatives of forward, backward_input and backward_weight
are made of each other: with F(x, w), I(g, w), W(g, x) for the three,
    dF: I(g, w) to the input,        W(g, x) to the weight
    dI: F(v, w) to the grad_output,  W(g, v) to the weight      (v: gradient of the grad_input)
    dW: F(x, v) to the grad_output,  I(g, v) to the input       (v: gradient of the grad_weight)
and forward mode (``jvp``) puts the tangent of one operand in its place, for each that has one.
Each saves what the inputs that require gradients ask for and computes those that the backward pass wants, nothing
else. ``geometry`` is (stride, padding, dilation, groups), and allow_winograd where the forward of the graph was told.
"""

from torch.autograd import Function

from cnn_ext import ops
from cnn_ext.autograd.function import asked_gradients, bilinear_tangent, differentiable, in_layout, save, weight_form
from cnn_ext.ops.shapes import conv2d_output_size


class _Forward(Function):
    """output = F(input, weight) + bias"""

    @staticmethod
    def forward(input, weight, bias, geometry):
        return ops.conv2d_forward(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.geometry = inputs
        input_needs, weight_needs, _, _ = ctx.needs_input_grad
        save(ctx, (input, weight), (input if weight_needs else None, weight if input_needs else None))
        ctx.input_size = input.shape if input_needs else None
        ctx.weight_form = weight_form(weight) if weight_needs else None
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        input_needs, weight_needs, bias_needs, _ = asked_gradients(ctx)
        grad_output = in_layout(grad_output, ctx.channels_last)
        grad_input = grad_weight = grad_bias = None
        if input_needs:
            grad_input = conv2d_backward_input(grad_output, weight, ctx.input_size, ctx.geometry)
        if weight_needs:
            grad_weight = conv2d_backward_weight(grad_output, input, ctx.geometry, ctx.weight_form)
        if bias_needs:
            grad_bias = conv2d_backward_bias(grad_output)
        return grad_input, grad_weight, grad_bias, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, _):
        input, weight = ctx.saved_tensors
        tangent = conv2d_tangent(input, weight, input_tangent, weight_tangent, ctx.geometry)
        return plus_bias(tangent, bias_tangent, conv2d_output_size(input.shape, weight.shape, *ctx.geometry[:4]))


class _BackwardInput(Function):
    """grad_input = I(grad_output, weight)"""

    @staticmethod
    def forward(grad_output, weight, input_size, geometry):
        return ops.conv2d_backward_input(grad_output, weight, input_size, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, grad_input):
        grad_output, weight, _, ctx.geometry = inputs
        grad_output_needs, weight_needs, *_ = ctx.needs_input_grad
        save(ctx, (grad_output, weight), (grad_output if weight_needs else None, weight if grad_output_needs else None))
        ctx.input_size, ctx.weight_form = grad_input.shape, weight_form(weight) if weight_needs else None
        ctx.channels_last = not grad_input.is_contiguous()

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        grad_output_needs, weight_needs, *_ = asked_gradients(ctx)
        grad = in_layout(grad, ctx.channels_last)
        grad_grad_output = grad_weight = None
        if grad_output_needs:
            grad_grad_output = conv2d(grad, weight, None, ctx.geometry)
        if weight_needs:
            grad_weight = conv2d_backward_weight(grad_output, grad, ctx.geometry, ctx.weight_form)
        return grad_grad_output, grad_weight, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, weight_tangent, *_):
        def compute(grad_output, weight):
            return conv2d_backward_input(grad_output, weight, ctx.input_size, ctx.geometry)

        return bilinear_tangent(compute, ctx.saved_tensors, (grad_output_tangent, weight_tangent))


class _BackwardWeight(Function):
    """grad_weight = W(grad_output, input), of the weight's form: its size, and whether it is channels_last"""

    @staticmethod
    def forward(grad_output, input, geometry, weight_form):
        size, channels_last = weight_form
        return ops.conv2d_backward_weight(grad_output, input, size, *geometry[:4], channels_last, *geometry[4:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.geometry, ctx.weight_form = inputs
        grad_output_needs, input_needs, *_ = ctx.needs_input_grad
        save(ctx, (grad_output, input), (grad_output if input_needs else None, input if grad_output_needs else None))
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        grad_output_needs, input_needs, *_ = asked_gradients(ctx)
        grad_grad_output = grad_input = None
        if grad_output_needs:
            grad_grad_output = conv2d(input, grad, None, ctx.geometry)
        if input_needs:
            grad_input = conv2d_backward_input(grad_output, grad, ctx.input_size, ctx.geometry)
        return grad_grad_output, grad_input, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, input_tangent, *_):
        def compute(grad_output, input):
            return conv2d_backward_weight(grad_output, input, ctx.geometry, ctx.weight_form)

        return bilinear_tangent(compute, ctx.saved_tensors, (grad_output_tangent, input_tangent))


class _BackwardBias(Function):
    """grad_bias = sum of grad_output over images and positions"""

    @staticmethod
    def forward(grad_output):
        return ops.conv2d_backward_bias(grad_output)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, (), ())
        ctx.output_size = inputs[0].shape

    @staticmethod
    def backward(ctx, grad):
        return grad.view(1, -1, 1, 1).expand(ctx.output_size)

    @staticmethod
    def jvp(ctx, tangent):
        return conv2d_backward_bias(tangent)


def conv2d_tangent(input, weight, input_tangent, weight_tangent, geometry):
    """The tangent of F(input, weight)."""

    def compute(input, weight):
        return conv2d(input, weight, None, geometry)

    return bilinear_tangent(compute, (input, weight), (input_tangent, weight_tangent))


def plus_bias(output, bias, output_size):
    """``output + bias``, either of which may be None."""
    if bias is None:
        return output
    bias = bias.view(1, -1, 1, 1)
    return bias.expand(output_size) if output is None else output + bias


def _compute(input, weight, bias, geometry, **hints):
    return ops.conv2d_forward(input, weight, bias, *geometry, **hints)


conv2d = differentiable(_Forward, _compute)
conv2d_backward_input = differentiable(_BackwardInput)
conv2d_backward_weight = differentiable(_BackwardWeight)
conv2d_backward_bias = differentiable(_BackwardBias)
