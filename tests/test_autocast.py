"""torch.autocast: convolutions run in the dtype of the region, poolings keep theirs, gradients the parameters'."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnn_ext
import cnn_ext.functional as C

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.float16, torch.bfloat16]


def operands(dtype=torch.float32, axes=2):
    sizes = (2, 4, *(7, 8)[:axes]), (6, 4, *(3, 3)[:axes]), (6,)
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


CONVOLUTIONS = {
    "conv2d": (C.conv2d, F.conv2d, 2),
    "conv1d": (C.conv1d, F.conv1d, 1),
    "conv2d with relu": (lambda *t: C.conv2d(*t, activation="relu"), lambda *t: F.conv2d(*t).relu(), 2),
    "conv2d_relu_max_pool2d": (C.conv2d_relu_max_pool2d, lambda *t: F.max_pool2d(F.conv2d(*t).relu(), 2), 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("given", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_convolution_runs_in_the_dtype_of_the_region(dtype, given, name):
    ours, torchs, axes = CONVOLUTIONS[name]
    tensors = operands(given, axes)
    with torch.autocast("cpu", dtype):
        got = ours(*tensors)
        assert torchs(*tensors).dtype == got.dtype == dtype
    exact = [t.detach().to(dtype).double().requires_grad_() for t in tensors]
    wanted = torchs(*exact)
    unit = torch.finfo(dtype).eps
    # The operands are rounded alike; a sum of 37 products in float32, rounded once to the half type.
    torch.testing.assert_close(got.double(), wanted, rtol=unit, atol=unit)
    grads = torch.autograd.grad(got.sum(), tensors)
    assert [grad.dtype for grad in grads] == [given] * 3
    if "relu" in name:
        return  # where the rounded and the exact sum differ in sign or order, so does the place of the gradient
    for grad, of_exact in zip(grads, torch.autograd.grad(wanted.sum(), exact), strict=True):
        scale = of_exact.abs().max().item()  # rounded to the half type, perhaps twice
        torch.testing.assert_close(grad.double(), of_exact, rtol=2 * unit, atol=unit * scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float64_is_untouched(dtype):
    with torch.autocast("cpu", dtype):
        assert C.conv2d(*operands(torch.float64)).dtype == torch.float64
        with pytest.raises(RuntimeError, match="should be the same"):
            C.conv2d(operands(torch.float64)[0], operands()[1])


@pytest.mark.parametrize("pool", [C.max_pool2d, C.avg_pool2d])
def test_poolings_keep_their_dtype(pool):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.float64, torch.float16):
            assert pool(torch.randn(1, 2, 4, 4, dtype=dtype), 2).dtype == dtype


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_where_no_region_is_active():
    tensors = operands()
    assert C.conv2d(*tensors).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert C.conv2d(*tensors).dtype == torch.float32
    with torch.autocast("cuda", torch.float16):  # of another device
        assert C.conv2d(*tensors).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        on_meta = [t.detach().to("meta") for t in tensors]
        assert C.conv2d(*on_meta).dtype == F.conv2d(*on_meta).dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_training_step(dtype):
    """A backward outside of the region, and one in it; the latter is not cast again."""
    model = cnn_ext.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)))
    with torch.autocast("cpu", dtype):
        output = model(torch.randn(2, 1, 10, 10))
        assert output.dtype == dtype
        output.float().square().mean().backward(retain_graph=True)
    inside = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    output.float().square().mean().backward()
    for one, parameter in zip(inside, model.parameters(), strict=True):
        assert one.dtype == parameter.dtype == torch.float32
        assert torch.equal(one, parameter.grad)


def test_torch_compile():
    torch._dynamo.reset()
    layer = cnn_ext.Conv2d(2, 3, 3)

    def in_region(images):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(images)

    images = torch.randn(1, 2, 6, 6)
    compiled = torch.compile(in_region, fullgraph=True, backend="aot_eager")
    outputs = [function(images) for function in (compiled, in_region)]
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(*outputs)
    grads = [torch.autograd.grad(output.sum(), list(layer.parameters())) for output in outputs]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
