"""Adaptive pooling and unpooling with gradients of every order.

Adaptive average pooling is linear and keeps nothing. Adaptive max pooling keeps its indices: its gradient is scattered
by them, added up where several meet; the derivative of that gathers by them, and so on. Unpooling is linear in what it
puts to its places, and its gradient gathers.
"""

import torch
from torch.autograd import Function

from cnn_ext import ops
from cnn_ext.autograd.function import differentiable, in_layout, lies_channels_last, needs_backward, save


class _AvgForward(Function):
    """output = means of the windows"""

    @staticmethod
    def forward(input, output_size):
        return ops.adaptive_avg_pool2d_forward(input, output_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.output_size = inputs
        save(ctx, (), ())
        ctx.input_size = input.shape
        ctx.channels_last = lies_channels_last(input)

    @staticmethod
    def backward(ctx, grad_output):
        return _avg_backward(in_layout(grad_output, ctx.channels_last), ctx.input_size), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return adaptive_avg_pool2d(tangent, ctx.output_size)


class _AvgBackward(Function):
    """grad_input = grad_output shared out over the windows"""

    @staticmethod
    def forward(grad_output, input_size):
        return ops.adaptive_avg_pool2d_backward(grad_output, input_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, ctx.input_size = inputs
        save(ctx, (), ())
        ctx.output_size = tuple(grad_output.shape[2:])
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad):
        return adaptive_avg_pool2d(in_layout(grad, ctx.channels_last), ctx.output_size), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _avg_backward(tangent, ctx.input_size)


class _MaxForward(Function):
    """output, indices = maxima of the windows and their places"""

    @staticmethod
    def forward(input, output_size, with_indices):
        return ops.adaptive_max_pool2d_forward(input, output_size, with_indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices = output
        ctx.mark_non_differentiable(indices)
        save(ctx, (indices,), (indices,))
        ctx.plane = tuple(inputs[0].shape[2:])
        ctx.channels_last = lies_channels_last(inputs[0])

    @staticmethod
    def backward(ctx, grad_output, _):
        (indices,) = ctx.saved_tensors
        return _scatter(in_layout(grad_output, ctx.channels_last), indices, ctx.plane), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (indices,) = ctx.saved_tensors
        return _gather(tangent, indices), None


class _Scatter(Function):
    """output = the sum of the input at each place that the indices name, in planes of ``plane``"""

    @staticmethod
    def forward(input, indices, plane):
        return ops.max_unpool2d_scatter(input, indices, plane)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, ctx.plane = inputs
        save(ctx, (indices,), (indices,))

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        return _gather(grad, indices), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (indices,) = ctx.saved_tensors
        return _scatter(tangent, indices, ctx.plane)


class _Gather(Function):
    """output = the input at the places that the indices name"""

    @staticmethod
    def forward(input, indices):
        return ops.max_unpool2d_gather(input, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, indices = inputs
        save(ctx, (indices,), (indices,))
        ctx.plane = tuple(input.shape[2:])
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        return _scatter(in_layout(grad_output, ctx.channels_last), indices, ctx.plane), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (indices,) = ctx.saved_tensors
        return _gather(tangent, indices)


class _Unpool(Function):
    """output = the input at the places that the indices name, 0 elsewhere"""

    @staticmethod
    def forward(input, indices, plane):
        return ops.max_unpool2d_forward(input, indices, plane)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, ctx.plane = inputs
        save(ctx, (indices,), (indices,))
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        return _gather(in_layout(grad_output, ctx.channels_last), indices), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (indices,) = ctx.saved_tensors
        return max_unpool2d(tangent, indices, ctx.plane)


adaptive_avg_pool2d = differentiable(_AvgForward)
_avg_backward = differentiable(_AvgBackward)
_adaptive_max_pool2d = differentiable(_MaxForward)
_scatter = differentiable(_Scatter)
_gather = differentiable(_Gather)
max_unpool2d = differentiable(_Unpool)


def adaptive_max_pool2d(input: torch.Tensor, output_size, with_indices: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima, and their indices where asked for or needed by a backward (else an empty tensor)."""
    return _adaptive_max_pool2d(input, output_size, with_indices or needs_backward(input))
