"""The package on a GPU: functions, layers and gradients against torch in float64, streams, graphs, autocast, compiled
models. Where there is no GPU all of it is skipped; the kernels' own tests are test_kernels.py and test_bits.py.

Most operands are whole numbers between -2 and 2, so that float32, TF32 and the half types sum their products without
rounding, in any order: results have to be torch's, rounded once, and maxima tie as often as they can.
"""

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnn_ext
import cnn_ext.functional as C

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("one_thread"),
]

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
RELU = {"activation": "relu"}


def torch_fused(input, weight, bias, pool_size=2, pool_stride=None, **geometry):
    return F.max_pool2d(F.conv2d(input, weight, bias, **geometry).relu(), pool_size, pool_stride)


def torch_relu(input, weight, bias, activation, **geometry):
    return F.conv2d(input, weight, bias, **geometry).relu()


# name: (ours, torch's, sizes of the operands, the other arguments)
FUNCTIONS = {
    "conv2d": (C.conv2d, F.conv2d, [(2, 5, 9, 11), (6, 5, 3, 3), (6,)], {"padding": 1}),
    "conv2d strided": (C.conv2d, F.conv2d, [(2, 5, 9, 11), (6, 5, 5, 3), (6,)], {"stride": (2, 3), "padding": (2, 0)}),
    "conv2d dilated": (C.conv2d, F.conv2d, [(2, 8, 9, 11), (8, 8, 3, 3), (8,)], {"dilation": 2, "padding": 2}),
    "conv2d grouped": (C.conv2d, F.conv2d, [(2, 8, 9, 11), (12, 4, 3, 3), (12,)], {"groups": 2, "padding": "same"}),
    "conv2d depthwise": (C.conv2d, F.conv2d, [(2, 8, 9, 11), (8, 1, 5, 5), (8,)], {"groups": 8, "padding": 2}),
    "conv2d 1x1": (C.conv2d, F.conv2d, [(2, 16, 9, 11), (24, 16, 1, 1), (24,)], {}),
    "conv2d stem": (C.conv2d, F.conv2d, [(2, 3, 19, 23), (16, 3, 7, 7), (16,)], {"stride": 2, "padding": 3}),
    "conv2d many channels": (C.conv2d, F.conv2d, [(2, 32, 9, 11), (72, 32, 3, 3), (72,)], {"padding": 1}),
    "conv1d": (C.conv1d, F.conv1d, [(2, 5, 19), (6, 5, 3), (6,)], {"stride": 2, "padding": 1}),
    "conv_transpose2d": (
        C.conv_transpose2d,
        F.conv_transpose2d,
        [(2, 6, 5, 7), (6, 4, 3, 3), (8,)],
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    ),
    "conv_transpose1d": (C.conv_transpose1d, F.conv_transpose1d, [(2, 6, 9), (6, 4, 3), (4,)], {"stride": 2}),
    "conv2d_relu_max_pool2d": (
        C.conv2d_relu_max_pool2d,
        torch_fused,
        [(2, 5, 9, 11), (6, 5, 3, 3), (6,)],
        {"padding": 1},
    ),
    "conv2d_relu_max_pool2d many channels": (
        C.conv2d_relu_max_pool2d,
        torch_fused,
        [(2, 32, 9, 11), (72, 32, 3, 3), (72,)],
        {"padding": 1},
    ),
    "conv2d_relu_max_pool2d overlapping windows": (
        C.conv2d_relu_max_pool2d,
        torch_fused,
        [(2, 16, 11, 13), (24, 16, 3, 3), (24,)],
        {"stride": 2, "padding": 1, "pool_size": 3, "pool_stride": 2},
    ),
    "conv2d relu": (C.conv2d, torch_relu, [(2, 16, 9, 11), (24, 16, 3, 3), (24,)], {"padding": 1, **RELU}),
    "conv2d relu stem": (C.conv2d, torch_relu, [(2, 3, 19, 23), (16, 3, 7, 7), (16,)], {"stride": 2, **RELU}),
    "max_pool2d": (
        C.max_pool2d,
        F.max_pool2d,
        [(2, 5, 9, 11)],
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "max_pool2d dilated": (C.max_pool2d, F.max_pool2d, [(2, 5, 9, 11)], {"kernel_size": 3, "stride": 1, "dilation": 2}),
    "max_pool1d": (C.max_pool1d, F.max_pool1d, [(2, 5, 11)], {"kernel_size": 3, "stride": 2}),
    "avg_pool2d": (
        C.avg_pool2d,
        F.avg_pool2d,
        [(2, 5, 9, 11)],
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    ),
    "avg_pool1d": (C.avg_pool1d, F.avg_pool1d, [(2, 5, 11)], {"kernel_size": 4, "ceil_mode": True}),
    "global avg_pool2d": (C.adaptive_avg_pool2d, F.adaptive_avg_pool2d, [(2, 5, 9, 11)], {"output_size": 1}),
    "adaptive_avg_pool2d": (C.adaptive_avg_pool2d, F.adaptive_avg_pool2d, [(2, 5, 9, 11)], {"output_size": (5, 4)}),
    "adaptive_max_pool2d": (C.adaptive_max_pool2d, F.adaptive_max_pool2d, [(2, 5, 9, 11)], {"output_size": (5, 4)}),
}


@functools.cache
def whole_numbers(size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(-2, 3, size, generator=torch.Generator().manual_seed(seed)).double()


def on_gpu(tensor: torch.Tensor, dtype=torch.float32, memory_format=torch.contiguous_format) -> torch.Tensor:
    """A leaf there."""
    moved = tensor.to(CUDA, dtype)
    if tensor.dim() == 4:
        moved = moved.contiguous(memory_format=memory_format)
    return moved.detach().requires_grad_()


def assert_rounded(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """The truth rounded to the result's dtype; averages are rounded a few times."""
    unit = torch.finfo(got.dtype).eps
    bound = 4 * unit * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(got.detach().cpu().double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_torchs(name, dtype, memory_format):
    ours, torchs, sizes, arguments = FUNCTIONS[name]
    operands = [whole_numbers(size, seed) for seed, size in enumerate(sizes)]
    tensors = [on_gpu(operand, dtype, memory_format) for operand in operands]
    exact = [operand.clone().requires_grad_() for operand in operands]
    output, wanted = ours(*tensors, **arguments), torchs(*exact, **arguments)
    assert output.is_cuda and output.dtype == dtype
    assert_rounded(output, wanted.detach())
    grad_output = whole_numbers(tuple(wanted.shape), 9)
    grads = torch.autograd.grad(output, tensors, grad_output.to(CUDA, dtype))
    for grad, of_torch in zip(grads, torch.autograd.grad(wanted, exact, grad_output), strict=True):
        assert_rounded(grad, of_torch)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "relu" in name])
def test_fused_in_strict_float32(name, memory_format, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    test_values_and_gradients_are_torchs(name, torch.float32, memory_format)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name):
    ours, _, sizes, arguments = FUNCTIONS[name]
    tensors = [on_gpu(torch.randn(size, dtype=torch.float64), torch.float64) for size in sizes]
    call = functools.partial(ours, **arguments)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [("Conv2d", (5, 6, 3), (2, 5, 9, 11)), ("Conv1d", (5, 6, 3), (2, 5, 19))], ids=str)
def test_padding_modes(layer, dtype, mode):
    name, arguments, size = layer
    torchs = getattr(nn, name)(*arguments, stride=2, padding=2, padding_mode=mode, dtype=torch.float64)
    for seed, parameter in enumerate(torchs.parameters()):
        parameter.data = whole_numbers(tuple(parameter.shape), seed)
    ours = cnn_ext.convert(torchs).to(CUDA, dtype)
    reference = getattr(nn, name)(*arguments, stride=2, padding=2, padding_mode=mode, dtype=torch.float64)
    reference.load_state_dict({key: value.cpu().double() for key, value in ours.state_dict().items()})
    operand = whole_numbers(size, 5)
    tensor, exact = on_gpu(operand, dtype), operand.clone().requires_grad_()
    output, wanted = ours(tensor), reference(exact)
    assert_rounded(output, wanted.detach())
    grad_output = whole_numbers(tuple(wanted.shape), 9)
    grads = torch.autograd.grad(output, [tensor, *ours.parameters()], grad_output.to(CUDA, dtype))
    truths = torch.autograd.grad(wanted, [exact, *reference.parameters()], grad_output)
    for grad, of_torch in zip(grads, truths, strict=True):
        assert_rounded(grad, of_torch)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_indices_and_unpooling(memory_format):
    operand = whole_numbers((2, 5, 8, 10))
    output, indices = C.max_pool2d(on_gpu(operand, memory_format=memory_format), 2, return_indices=True)
    wanted, places = F.max_pool2d(operand, 2, return_indices=True)
    assert_rounded(output, wanted)
    assert torch.equal(indices.cpu(), places)
    pooled = on_gpu(wanted, memory_format=memory_format)
    unpooled = C.max_unpool2d(pooled, indices, 2)
    exact = wanted.clone().requires_grad_()
    truth = F.max_unpool2d(exact, places, 2)
    assert_rounded(unpooled, truth.detach())
    grad_output = whole_numbers(tuple(truth.shape), 9)
    (grad,) = torch.autograd.grad(unpooled, pooled, grad_output.to(CUDA, torch.float32))
    assert_rounded(grad, torch.autograd.grad(truth, exact, grad_output)[0])


def test_unpooling_ignores_indices_outside():
    values, indices = torch.ones(1, 1, 2, 2, device=CUDA), torch.tensor([[[[0, 99], [-1, 5]]]], device=CUDA)
    unpooled = C.max_unpool2d(values, indices, 2)
    assert unpooled.flatten().nonzero().flatten().tolist() == [0, 5]


def test_adaptive_indices():
    operand = whole_numbers((2, 5, 9, 11))
    output, indices = C.adaptive_max_pool2d(on_gpu(operand), (5, 4), return_indices=True)
    wanted, places = F.adaptive_max_pool2d(operand, (5, 4), return_indices=True)
    assert_rounded(output, wanted)
    assert torch.equal(indices.cpu(), places)


def cnn() -> nn.Sequential:
    """Torch's layers, with whole numbers for parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8, padding="same"),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
    )
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = whole_numbers(tuple(parameter.shape), seed).float()
    return model


@pytest.mark.parametrize("fuse", [False, True])
def test_a_converted_model(fuse):
    reference = cnn().double()
    model = cnn_ext.convert(cnn().to(CUDA), fuse=fuse)
    images = whole_numbers((2, 3, 16, 16))
    output, wanted = model(images.to(CUDA, torch.float32)), reference(images)
    assert_rounded(output, wanted.detach())
    output.sum().backward()
    wanted.sum().backward()
    for parameter, of_torch in zip(model.parameters(), reference.parameters(), strict=True):
        assert_rounded(parameter.grad, of_torch.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    model = cnn_ext.convert(cnn().to(CUDA))
    images = whole_numbers((2, 3, 16, 16)).to(CUDA, torch.float32)
    with torch.autocast("cuda", dtype):
        first = model[0](images)
        assert first.dtype == dtype
        model(images).float().sum().backward()
    assert_rounded(first, cnn()[0].double()(images.cpu().double()).detach())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def differentiated(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    output = model(images)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


def test_a_captured_graph_gives_the_same_bits_and_neither_waits_nor_allocates():
    model = cnn_ext.convert(cnn().to(CUDA))
    images = torch.randn(4, 3, 16, 16, device=CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        differentiated(model, images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiated(model, images)
    others = torch.randn(4, 3, 16, 16, device=CUDA)
    wanted = differentiated(model, others)
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images.copy_(others)
        graph.replay()
        assert torch.cuda.memory_allocated() == allocated
        differentiated(model, images)  # nor do the calls themselves wait
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(got, eager) for got, eager in zip(captured, wanted, strict=True))


def test_kernels_run_on_the_current_stream():
    weight = torch.randn(8, 8, 3, 3, device=CUDA)
    images, zeros = torch.randn(4, 8, 32, 32, device=CUDA), torch.zeros(4, 8, 32, 32, device=CUDA)
    wanted = C.conv2d(images, weight)
    pooled = C.max_pool2d(images, 2)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 25 ms: whoever does not wait in line reads zeros
        zeros.copy_(images)
        results = C.conv2d(zeros, weight), C.max_pool2d(zeros, 2)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(results[0], wanted) and torch.equal(results[1], pooled)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_the_tensors_device_serves():
    tensors = [torch.randn(size, device="cuda:1") for size in ((2, 5, 9, 11), (6, 5, 3, 3))]
    with torch.cuda.device(0):
        output = C.max_pool2d(C.conv2d(*tensors), 2)
        assert torch.cuda.current_device() == 0
    assert output.device == tensors[0].device
    with pytest.raises(RuntimeError, match="cuda:0"):
        C.conv2d(tensors[0], tensors[1].to("cuda:0"))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_the_batch_nor_on_the_run(dtype, memory_format):
    model = cnn_ext.convert(cnn().to(CUDA, dtype, memory_format=memory_format))
    images = torch.randn(5, 3, 16, 16, device=CUDA).to(dtype, memory_format=memory_format).requires_grad_()

    def run(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(tensor)
        return output.detach(), torch.autograd.grad(output.sum(), tensor)[0]

    output, grad = run(images)
    for got, again in zip(run(images), (output, grad), strict=True):
        assert torch.equal(got, again)
    for first in range(5):
        part = images[first : first + 1].detach().requires_grad_()
        for got, whole in zip(run(part), (output, grad), strict=True):
            assert torch.equal(got, whole[first : first + 1])


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d", "avg_pool2d", "adaptive_max_pool2d"])
def test_views_and_empty_batches(name):
    ours, torchs, sizes, arguments = FUNCTIONS[name]
    operands = [whole_numbers(size, seed) for seed, size in enumerate(sizes)]
    wanted = torchs(*operands, **arguments)
    others = [operand.to(CUDA, torch.float32) for operand in operands[1:]]
    wide = torch.randn(3, 6, 10, 12, device=CUDA)
    view = wide[1:, 1:, 1:, 1:]  # neither contiguous nor aligned
    view.copy_(operands[0])
    mirrored = operands[0].to(CUDA, torch.float32).transpose(2, 3).contiguous().transpose(2, 3)
    for input in (view, mirrored):
        assert not input.is_contiguous()
        assert_rounded(ours(input, *others, **arguments), wanted)
    shifted = torch.empty(operands[0].numel() + 1, device=CUDA)[1:].view(operands[0].shape).copy_(operands[0])
    assert_rounded(ours(shifted, *others, **arguments), wanted)
    empty = view[:0].detach().requires_grad_()
    output = ours(empty, *others, **arguments)
    assert output.shape == (0, *wanted.shape[1:])
    output.sum().backward()
    assert empty.grad.shape == empty.shape


def test_padding_never_multiplies():
    weight = torch.full((4, 4, 3, 3), torch.inf, device=CUDA)
    weight[:, :, 1, 1] = 1
    images = torch.ones(1, 4, 1, 1, device=CUDA)
    assert torch.equal(C.conv2d(images, weight, padding=1), torch.full((1, 4, 1, 1), 4.0, device=CUDA))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")),
    ],
)
def test_compiled_models(backend):
    torch._dynamo.reset()
    model = cnn_ext.convert(cnn().to(CUDA))
    images = whole_numbers((2, 3, 16, 16)).to(CUDA, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for got, wanted in zip(differentiated(compiled, images), differentiated(model, images), strict=True):
        assert_rounded(got, wanted.cpu().double())


def test_float32_is_exact_where_tf32_is_not_allowed():
    """A weight of 1 + 2^-12 is 1 in TF32, and in float32 64 of them add up without rounding."""
    weight = torch.full((64, 64, 1, 1), 1 + 2.0**-12, device=CUDA)
    images = torch.ones(2, 64, 8, 8, device=CUDA)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        output = C.conv2d(images, weight)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    assert torch.equal(output, torch.full_like(output, 64 * (1 + 2.0**-12)))


def test_refusals():
    images, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.FloatTensor"):
        C.conv2d(images.to(CUDA), weight)
    with pytest.raises(NotImplementedError, match="Long"):
        C.max_pool2d(images.to(CUDA).long(), 2)


def test_a_call_is_explained():
    images, weight = torch.randn(1, 3, 8, 8, device=CUDA), torch.randn(4, 3, 3, 3, device=CUDA)
    explanation = cnn_ext.explain(images, weight)
    assert explanation.kernel in {row.name for row in cnn_ext.kernels() if row.device == "cuda"}


@pytest.mark.slow
def test_tensors_of_more_than_2_31_elements():
    images = torch.empty(33, 1, 8192, 8192, dtype=torch.bfloat16, device=CUDA)
    images.random_(-2, 3, generator=torch.Generator(CUDA).manual_seed(1))
    weight = torch.ones(1, 1, 3, 3, dtype=torch.bfloat16, device=CUDA)
    for call in (lambda t: C.max_pool2d(t, 2), lambda t: C.avg_pool2d(t, 2), lambda t: C.conv2d(t, weight, padding=1)):
        assert torch.equal(call(images)[32], call(images[32:])[0])
