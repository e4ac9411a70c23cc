"""torch.compile(fullgraph=True) and torch.export of a CNN: no graph break, the gradients of eager mode."""

import pytest
import torch
import torch._inductor.config
from torch import nn

import cnn_ext

pytestmark = pytest.mark.usefixtures("one_thread")


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            cnn_ext.Conv2d(1, 4, 5, padding="same"),
            nn.ReLU(),
            cnn_ext.MaxPool2d(2),
            cnn_ext.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            cnn_ext.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 10),
        )

    def forward(self, images):
        return self.layers(images)


def gradients(model, call, images):
    images = images.clone().requires_grad_()
    output = call(images)
    return [output.detach(), *torch.autograd.grad(output.logsumexp(1).sum(), [images, *model.parameters()])]


def agrees_with_eager(model, batches, backend, dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in batches:
        images = torch.randn(batch, 1, 16, 16)
        for got, wanted in zip(gradients(model, compiled, images), gradients(model, model, images), strict=True):
            # The surroundings may be fused and so rounded otherwise, the kernels are the same: a few roundings.
            tolerance = 16 * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
def test_ahead_of_time(dynamic):
    agrees_with_eager(CNN(), (3, 5), "aot_eager", dynamic)


def test_inductor():
    small = nn.Sequential(cnn_ext.Conv2d(1, 2, 3), nn.ReLU(), cnn_ext.MaxPool2d(2), nn.Flatten())
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):  # spares its trial compilations
        agrees_with_eager(small, (2,), "inductor")


def test_one_tensor_twice():
    torch._dynamo.reset()
    tensor = torch.randn(4, 4, 3, 3, requires_grad=True)

    def twice(t):
        return cnn_ext.functional.conv2d(t, t, padding=1).square().sum()

    (wanted,) = torch.autograd.grad(twice(tensor), tensor)
    (got,) = torch.autograd.grad(torch.compile(twice, fullgraph=True, backend="aot_eager")(tensor), tensor)
    torch.testing.assert_close(
        got, wanted, rtol=0, atol=36 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
    )


def test_export():
    model = CNN().eval()
    images = torch.randn(2, 1, 16, 16)
    exported = torch.export.export(model, (images,))
    assert torch.equal(exported.module()(images), model(images))
    assert "cnn_ext.conv2d_forward" in str(exported.graph)


C = cnn_ext.functional
DYNAMIC = {
    "conv1d": lambda x, w: C.conv1d(x[:, :, 0], w[:, :, 0], padding="same"),
    "conv_transpose2d": lambda x, w: C.conv_transpose2d(x, w, stride=2, output_padding=1),
    "conv_transpose1d": lambda x, w: C.conv_transpose1d(x[:, :, 0], w[:, :, 0], stride=2),
    "max_pool1d": lambda x, w: C.max_pool1d(x[:, :, 0], 2),
    "avg_pool1d": lambda x, w: C.avg_pool1d(x[:, :, 0], 2),
    "adaptive_avg_pool2d": lambda x, w: C.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_max_pool2d": lambda x, w: C.adaptive_max_pool2d(x, (3, 2)),
    "max_unpool2d": lambda x, w: C.max_unpool2d(*C.max_pool2d(x, 2, return_indices=True), 2),
    "conv2d_relu_max_pool2d": lambda x, w: C.conv2d_relu_max_pool2d(x, w),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_graph_for_every_batch(name):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    function = DYNAMIC[name]
    compiled = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    for batch in (2, 3, 5):
        input = torch.randn(batch, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        outputs = [call(input, weight) for call in (compiled, function)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(o.square().sum(), (input, weight), allow_unused=True) for o in outputs]
        for got, wanted in zip(*gradients, strict=True):
            assert got is wanted is None or torch.equal(got, wanted)
    assert len(graphs) == 1
