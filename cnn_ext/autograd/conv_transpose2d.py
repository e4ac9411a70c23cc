"""The transposed convolution with gradients of every order.

It is the gradient of a convolution's input, plus a bias: output = I(input, weight) + bias in the letters of
``cnn_ext.autograd.conv2d``, whose functions are its derivatives,
    F(v, w) to the input,  W(input, v) to the weight      (v: gradient of the output).
"""

from torch.autograd import Function

from cnn_ext import ops
from cnn_ext.autograd.conv2d import conv2d, conv2d_backward_bias, conv2d_backward_weight, plus_bias
from cnn_ext.autograd.function import asked_gradients, bilinear_tangent, differentiable, in_layout, save, weight_form


class _Forward(Function):
    """output = I(input, weight) + bias; ``geometry`` is that of the convolution whose input has ``output_size``"""

    @staticmethod
    def forward(input, weight, bias, output_size, geometry):
        return ops.conv_transpose2d_forward(input, weight, bias, output_size, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, _, ctx.geometry = inputs
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        save(ctx, (input, weight), (input if weight_needs else None, weight if input_needs else None))
        ctx.output_size, ctx.weight_form = output.shape, weight_form(weight) if weight_needs else None
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        input_needs, weight_needs, bias_needs, *_ = asked_gradients(ctx)
        grad = in_layout(grad, ctx.channels_last)
        grad_input = grad_weight = grad_bias = None
        if input_needs:
            grad_input = conv2d(grad, weight, None, ctx.geometry)
        if weight_needs:
            grad_weight = conv2d_backward_weight(input, grad, ctx.geometry, ctx.weight_form)
        if bias_needs:
            grad_bias = conv2d_backward_bias(grad)
        return grad_input, grad_weight, grad_bias, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        def compute(input, weight):
            return conv_transpose2d(input, weight, None, ctx.output_size, ctx.geometry)

        tangent = bilinear_tangent(compute, ctx.saved_tensors, (input_tangent, weight_tangent))
        return plus_bias(tangent, bias_tangent, ctx.output_size)


conv_transpose2d = differentiable(_Forward)
