"""The convolution with gradients of every order.

Convolution is linear in the input and in the weight, so the derivatives of forward, backward_input and backward_weight
are made of each other: with F(x, w), I(g, w), W(g, x) for the three,
    dF: I(g, w) to the input,        W(g, x) to the weight
    dI: F(v, w) to the grad_output,  W(g, v) to the weight      (v: gradient of the grad_input)
    dW: F(x, v) to the grad_output,  I(g, v) to the input       (v: gradient of the grad_weight)
Each saves and computes what the inputs that require gradients ask for, nothing else; torch does not tell a Function
which of them torch.autograd.grad(output, weight) leaves out, so that computes the input's as well. ``geometry`` is
(stride, padding, dilation, groups), and allow_winograd where the forward of the graph was told.
"""

from torch.autograd import Function

from cnn_ext import ops
from cnn_ext.autograd.function import differentiable, in_layout
from cnn_ext.ops.shapes import is_channels_last, spec


class _Forward(Function):
    """output = F(input, weight) + bias"""

    @staticmethod
    def forward(input, weight, bias, geometry):
        return ops.conv2d_forward(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.geometry = inputs
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if weight_needs else None, weight if input_needs else None)
        ctx.input_size, ctx.weight = input.shape, spec(weight) if weight_needs else None
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        input_needs, weight_needs, bias_needs, _ = ctx.needs_input_grad
        grad_output = in_layout(grad_output, ctx.channels_last)
        grad_input = grad_weight = grad_bias = None
        if input_needs:
            grad_input = conv2d_backward_input(grad_output, weight, ctx.input_size, ctx.geometry)
        if weight_needs:
            grad_weight = conv2d_backward_weight(grad_output, input, ctx.geometry, ctx.weight)
        if bias_needs:
            grad_bias = conv2d_backward_bias(grad_output)
        return grad_input, grad_weight, grad_bias, None


class _BackwardInput(Function):
    """grad_input = I(grad_output, weight)"""

    @staticmethod
    def forward(grad_output, weight, input_size, geometry):
        return ops.conv2d_backward_input(grad_output, weight, input_size, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, _, ctx.geometry = inputs
        grad_output_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(grad_output if weight_needs else None, weight if grad_output_needs else None)
        ctx.weight = spec(weight) if weight_needs else None
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        grad_output_needs, weight_needs, *_ = ctx.needs_input_grad
        grad = in_layout(grad, ctx.channels_last)
        grad_grad_output = grad_weight = None
        if grad_output_needs:
            grad_grad_output = conv2d(grad, weight, None, ctx.geometry)
        if weight_needs:
            grad_weight = conv2d_backward_weight(grad_output, grad, ctx.geometry, ctx.weight)
        return grad_grad_output, grad_weight, None, None


class _BackwardWeight(Function):
    """grad_weight = W(grad_output, input), of the size and layout of ``weight`` (a TensorSpec)"""

    @staticmethod
    def forward(grad_output, input, geometry, weight):
        size, layout = weight.size, is_channels_last(weight)
        return ops.conv2d_backward_weight(grad_output, input, size, *geometry[:4], layout, *geometry[4:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.geometry, _ = inputs
        grad_output_needs, input_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(grad_output if input_needs else None, input if grad_output_needs else None)
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        grad_output_needs, input_needs, *_ = ctx.needs_input_grad
        grad_grad_output = grad_input = None
        if grad_output_needs:
            grad_grad_output = conv2d(input, grad, None, ctx.geometry)
        if input_needs:
            grad_input = conv2d_backward_input(grad_output, grad, ctx.input_size, ctx.geometry)
        return grad_grad_output, grad_input, None, None


class _BackwardBias(Function):
    """grad_bias = sum of grad_output over images and positions"""

    @staticmethod
    def forward(grad_output):
        return ops.conv2d_backward_bias(grad_output)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.output_size = inputs[0].shape

    @staticmethod
    def backward(ctx, grad):
        return grad.view(1, -1, 1, 1).expand(ctx.output_size)


conv2d = differentiable(_Forward)
conv2d_backward_input = differentiable(_BackwardInput)
conv2d_backward_weight = differentiable(_BackwardWeight)
conv2d_backward_bias = differentiable(_BackwardBias)
