"""convert(fuse=True) with batch normalisation: folded in evaluation mode, by itself in training mode, and back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cnn_ext
from cnn_ext import _native

pytestmark = pytest.mark.usefixtures("one_thread")


def chains(bias=True, affine=True, padding_mode="zeros"):
    first = nn.Conv2d(2, 4, 3, padding=1, bias=bias, padding_mode=padding_mode)
    second = nn.Conv2d(4, 3, 3, bias=bias)
    net = nn.Sequential(
        *(first, nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.MaxPool2d(2)),
        *(second, nn.BatchNorm2d(3, affine=affine), nn.ReLU(inplace=True)),
    ).double()
    for norm in (net[1], net[5]):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        if affine:
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return net


def outcome(net, images):
    output = net(images)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(net.parameters()))]


def assert_close(got, wanted):
    for one, other in zip(got, wanted, strict=True):  # sums of up to 200 terms, two layers and their normalisations
        tolerance = torch.finfo(other.dtype).eps * 1000 * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.fixture
def forwards(monkeypatch):
    calls = []
    for name in ("conv2d_forward", "conv2d_relu_max_pool2d_forward", "max_pool2d_forward"):
        kernel = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    return calls


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_in_evaluation_mode_alone(bias, affine, forwards):
    theirs = chains(bias, affine)
    ours = cnn_ext.convert(copy.deepcopy(theirs), fuse=True)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for training, kernels in (
        (False, ["conv2d_relu_max_pool2d_forward"] * 2),
        (True, ["conv2d_forward", "max_pool2d_forward", "conv2d_forward"]),
        (False, ["conv2d_relu_max_pool2d_forward"] * 2),  # with the statistics that the training mode has changed
    ):
        forwards.clear()
        assert_close(outcome(ours.train(training), images), outcome(theirs.train(training), images))
        assert forwards == kernels
        for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert_close([one.double()], [other.double()])


def test_frozen_statistics_in_a_model_that_trains(forwards):
    """The mode of the normalisation counts, as in fine-tuning with frozen statistics."""
    ours = cnn_ext.convert(chains(), fuse=True).train()
    ours[1].eval(), ours[5].eval()
    ours(torch.randn(1, 2, 8, 8, dtype=torch.float64))
    assert forwards == ["conv2d_relu_max_pool2d_forward"] * 2


def test_there_and_back():
    net = chains().eval()
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    types, wanted = [type(m) for m in net.modules()], net(images)
    for twin in (cnn_ext.convert(net, fuse=True), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            twin[1].weight.mul_(2), twin[1].bias.add_(1)
            changed = twin(images)
            twin[1].weight.div_(2), twin[1].bias.sub_(1)
        assert not torch.allclose(changed, wanted)  # each copy reads the normalisation of its own
        assert_close([twin(images)], [wanted])
    assert "fused" in str(cnn_ext.conversion_report(net))
    cnn_ext.revert(net)
    assert [type(m) for m in net.modules()] == types
    assert_close([net(images)], [wanted])


def test_what_stands_in_the_way():
    hooked = chains()
    hooked[1].register_forward_hook(lambda *_: None)
    cnn_ext.convert(hooked, fuse=True)
    assert "1 has hooks" in str(cnn_ext.conversion_report(hooked))
    skipped = cnn_ext.convert(chains(), fuse=True, skip={"1"})
    notes = {row.name: row.note for row in cnn_ext.conversion_report(skipped) if row.note}
    assert notes == {"4": "fused in evaluation mode with 5, 6", "5": "computed with 4", "6": "computed with 4"}
    transposed = cnn_ext.convert(nn.Sequential(nn.ConvTranspose2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU()), fuse=True)
    assert [type(m) for m in transposed] == [cnn_ext.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("training", [False, True])
def test_without_relu(training, padding_mode, forwards):
    """What follows may be another activation, or the sum of a residual block."""
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode)
    theirs = nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU6(), nn.MaxPool2d(2)).double().train(training)
    nn.init.normal_(theirs[1].weight), theirs[1].running_mean.normal_(), theirs[1].running_var.uniform_(0.5, 2)
    ours = cnn_ext.convert(copy.deepcopy(theirs), fuse=True)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    assert_close(outcome(ours, images), outcome(theirs, images))
    assert forwards == ["conv2d_forward", "max_pool2d_forward"]
    assert "fused" in str(cnn_ext.conversion_report(ours))
    assert [type(m) for m in cnn_ext.revert(ours)] == [type(m) for m in theirs]


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_with_a_padding_mode(padding_mode):
    theirs = chains(padding_mode=padding_mode)
    ours = cnn_ext.convert(copy.deepcopy(theirs), fuse=True)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    for training in (False, True):
        assert_close(outcome(ours.train(training), images), outcome(theirs.train(training), images))


def test_compiled_and_traced():
    net = cnn_ext.convert(chains(), fuse=True).eval()
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    for twin in (torch.compile(net, fullgraph=True, backend="aot_eager"), torch.fx.symbolic_trace(net)):
        assert_close([twin(images)], [net(images)])


def test_statistics_of_the_batch_where_none_are_kept():
    theirs = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()).double().eval()
    ours = cnn_ext.convert(copy.deepcopy(theirs), fuse=True)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    assert_close(outcome(ours, images), outcome(theirs, images))


@pytest.mark.parametrize("all_half", [True, False])
def test_half_precision(all_half):
    """A weight is rounded once with its factor in it: half an ulp of each term, and one of the result."""
    theirs = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.normal_(theirs[1].weight), theirs[1].running_mean.normal_(), theirs[1].running_var.uniform_(0.5, 2)
    (theirs if all_half else theirs[0]).bfloat16()
    ours = cnn_ext.convert(copy.deepcopy(theirs), fuse=True)
    exact = copy.deepcopy(theirs).double()
    images = torch.randn(3, 2, 8, 8, dtype=torch.bfloat16)
    output, wanted = ours(images), exact(images.double())
    assert output.dtype == torch.bfloat16
    with torch.no_grad():
        scale = exact[1].weight * torch.rsqrt(exact[1].running_var + exact[1].eps)
        weight, bias = (exact[0].weight * scale.view(-1, 1, 1, 1)).abs(), (exact[1](exact[0].bias.view(1, -1, 1, 1)))
        terms = nn.functional.conv2d(images.double().abs(), weight, bias.flatten().abs(), padding=1)
    assert torch.all((output.double() - wanted).abs() <= 2**-8 * (terms + wanted))
