"""Max and average pooling with gradients of every order.

Max pooling keeps the offsets of the maxima and nothing else: its backward scatters by them, the backward of that
gathers by them, and so on. Average pooling is linear and keeps nothing. ``window`` is (kernel_size, stride, padding,
dilation, ceil_mode); ``divisor`` is (count_include_pad, divisor_override).
"""

import torch
from torch.autograd import Function

from cnn_ext import ops
from cnn_ext.autograd.function import differentiable, in_layout, lies_channels_last, needs_backward, save


class _MaxForward(Function):
    """output, offsets = maxima of the windows and their places"""

    @staticmethod
    def forward(input, window, with_offsets):
        return ops.max_pool2d_forward(input, *window, with_offsets)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.window, _ = inputs
        _, offsets = output
        ctx.mark_non_differentiable(offsets)
        save(ctx, (offsets,), (offsets,))
        ctx.input_size = input.shape
        ctx.channels_last = lies_channels_last(input)

    @staticmethod
    def backward(ctx, grad_output, _):
        (offsets,) = ctx.saved_tensors
        grad_output = in_layout(grad_output, ctx.channels_last)
        return _max_pool2d_backward(grad_output, offsets, ctx.input_size, ctx.window), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(tangent, offsets, ctx.window), None


class _MaxBackward(Function):
    """grad_input = grad_output scattered to the places of the maxima"""

    @staticmethod
    def forward(grad_output, offsets, input_size, window):
        return ops.max_pool2d_backward(grad_output, offsets, input_size, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, offsets, ctx.input_size, ctx.window = inputs
        save(ctx, (offsets,), (offsets,))

    @staticmethod
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(grad, offsets, ctx.window), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (offsets,) = ctx.saved_tensors
        return _max_pool2d_backward(tangent, offsets, ctx.input_size, ctx.window)


class _MaxGather(Function):
    """output = input at the places of the maxima"""

    @staticmethod
    def forward(input, offsets, window):
        return ops.max_pool2d_gather(input, offsets, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offsets, ctx.window = inputs
        save(ctx, (offsets,), (offsets,))
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx, grad_output):
        (offsets,) = ctx.saved_tensors
        return _max_pool2d_backward(grad_output, offsets, ctx.input_size, ctx.window), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(tangent, offsets, ctx.window)


class _AvgForward(Function):
    """output = means of the windows"""

    @staticmethod
    def forward(input, window, divisor):
        return ops.avg_pool2d_forward(input, *window, *divisor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.window, ctx.divisor = inputs
        save(ctx, (), ())
        ctx.input_size = input.shape
        ctx.channels_last = lies_channels_last(input)

    @staticmethod
    def backward(ctx, grad_output):
        grad_output = in_layout(grad_output, ctx.channels_last)
        return _avg_pool2d_backward(grad_output, ctx.input_size, ctx.window, ctx.divisor), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return avg_pool2d(tangent, ctx.window, ctx.divisor)


class _AvgBackward(Function):
    """grad_input = grad_output shared out over the windows"""

    @staticmethod
    def forward(grad_output, input_size, window, divisor):
        return ops.avg_pool2d_backward(grad_output, input_size, *window, *divisor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.input_size, ctx.window, ctx.divisor = inputs
        save(ctx, (), ())
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad):
        return avg_pool2d(in_layout(grad, ctx.channels_last), ctx.window, ctx.divisor), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _avg_pool2d_backward(tangent, ctx.input_size, ctx.window, ctx.divisor)


_max_pool2d = differentiable(_MaxForward)
_max_pool2d_backward = differentiable(_MaxBackward)
max_pool2d_gather = differentiable(_MaxGather)
avg_pool2d = differentiable(_AvgForward)
_avg_pool2d_backward = differentiable(_AvgBackward)


def max_pool2d(input: torch.Tensor, window, with_offsets: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima, and their offsets where asked for or needed by a backward (else an empty tensor)."""
    return _max_pool2d(input, window, with_offsets or needs_backward(input))
