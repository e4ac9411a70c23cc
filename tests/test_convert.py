"""convert and revert: exact classes swapped in place, everything attached to them kept, and back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cnn_ext
from cnn_ext import _native

pytestmark = pytest.mark.usefixtures("one_thread")


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(OwnForward(4, 4, 3), nn.AvgPool2d(2)),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def types(module):
    return [type(m) for m in module.modules()]


def test_there_and_back():
    net = model().eval()
    images = torch.randn(2, 1, 16, 16)
    wanted, before, state = net(images), types(net), net.state_dict()
    parameters = [id(p) for p in net.parameters()]
    assert cnn_ext.convert(net) is net
    assert type(net[0]) is cnn_ext.Conv2d and type(net[2]) is cnn_ext.MaxPool2d and type(net[3][1]) is cnn_ext.AvgPool2d
    assert type(net[3][0]) is OwnForward
    assert [id(p) for p in net.parameters()] == parameters
    assert list(net.state_dict()) == list(state)
    assert not any(m.training for m in net.modules())
    tolerance = torch.finfo(torch.float32).eps * 36 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(net(images), wanted, rtol=0, atol=tolerance)
    assert cnn_ext.revert(net) is net
    assert types(net) == before
    assert torch.equal(net(images), wanted)


def test_hooks_stay():
    net, calls = model(), []
    handle = net[0].register_forward_hook(lambda *_: calls.append("forward"))
    cnn_ext.convert(net)(torch.randn(2, 1, 16, 16))
    assert calls == ["forward"]
    handle.remove()
    cnn_ext.revert(net)(torch.randn(2, 1, 16, 16))
    assert calls == ["forward"]


def test_an_optimiser_goes_on():
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    cnn_ext.convert(net)
    before = net[0].weight.detach().clone()
    net(torch.randn(2, 1, 16, 16)).sum().backward()
    optimiser.step()
    assert not torch.equal(net[0].weight, before)


def test_a_copy_leaves_the_model_alone():
    net = model()
    copied = cnn_ext.convert(net, inplace=False)
    assert type(net[0]) is nn.Conv2d and type(copied[0]) is cnn_ext.Conv2d
    assert copied[0].weight is not net[0].weight


def test_a_layer_alone():
    assert type(cnn_ext.convert(nn.MaxPool2d(2))) is cnn_ext.MaxPool2d


def test_a_layer_used_twice_is_one_layer():
    layer = nn.Conv2d(2, 2, 3)
    net = cnn_ext.convert(nn.Sequential(layer, layer))
    assert net[0] is net[1] is layer and type(layer) is cnn_ext.Conv2d


@pytest.mark.parametrize(
    "selection",
    [dict(only={"0"}), dict(only=lambda name, module: name == "0"), dict(skip={"2", "3.1"})],
    ids=["names", "function", "skip"],
)
def test_selections(selection):
    net = cnn_ext.convert(model(), **selection)
    assert [type(m).__module__.startswith("cnn_ext") for m in (net[0], net[2], net[3][1])] == [True, False, False]


def chains():
    """Three convolutions with a ReLU, the first with a pool, the second with one that cannot be fused."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
        nn.Conv2d(4, 2, 1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
    )


def outcome(net, images):
    """The output and all gradients."""
    output = net(images)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(net.parameters()))]


def test_fused_there_and_back():
    net = chains()
    images = torch.randn(2, 1, 16, 16)
    wanted, before, state = outcome(net, images), types(net), list(net.state_dict())
    parameters = [id(p) for p in net.parameters()]
    cnn_ext.convert(net, fuse=True)
    assert [(net[i].pool_size, net[i].pool_stride) for i in (0, 4)] == [(2, 2), (1, 1)]
    assert (net[3][0].pool_size, type(net[3][2])) == (1, cnn_ext.MaxPool2d)
    assert list(net.state_dict()) == state and [id(p) for p in net.parameters()] == parameters
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for got, torchs in zip(outcome(twin, images), wanted, strict=True):
            # Two layers of sums of up to 512 terms.
            tolerance = torch.finfo(torch.float32).eps * 1024 * torchs.abs().max().item()
            torch.testing.assert_close(got, torchs, rtol=0, atol=tolerance)
    assert types(cnn_ext.revert(net)) == before
    assert not hasattr(net[0], "pool_size")
    assert all(torch.equal(a, b) for a, b in zip(outcome(net, images), wanted, strict=True))


def test_what_is_fused_is_not_computed_twice(monkeypatch):
    calls = []
    for name in ("conv2d_forward", "conv2d_relu_max_pool2d_forward", "max_pool2d_forward"):
        kernel = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    cnn_ext.convert(chains(), fuse=True)(torch.randn(2, 1, 16, 16))
    fused = "conv2d_relu_max_pool2d_forward"
    # The second one has padding_mode='reflect', which the fused kernels do not read.
    assert calls == [fused, "conv2d_forward", "max_pool2d_forward", fused]


def test_hooks_and_shared_layers_stand_in_the_way_of_fusion():
    hooked, shared = chains(), nn.ReLU()
    seen = []
    hooked[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    hooked[3][1].register_forward_pre_hook(lambda *_: None)
    hooked[4].register_forward_pre_hook(lambda *_: None)  # which sees what it saw
    cnn_ext.convert(hooked, fuse=True)(torch.randn(1, 1, 16, 16))
    assert seen == [(1, 4, 16, 16)]
    notes = {row.name: row.note for row in cnn_ext.conversion_report(hooked) if row.note}
    assert notes.keys() == {"0", "3.0", "4", "5"}
    assert "0 has hooks" in notes["0"] and "3.1 has hooks" in notes["3.0"] and "fused with" in notes["4"]
    net = nn.Sequential(nn.Conv2d(1, 1, 3), shared, nn.Conv2d(1, 1, 3), shared)
    cnn_ext.convert(net, fuse=True)
    assert type(net[0]) is type(net[2]) is cnn_ext.Conv2d and type(shared) is nn.ReLU
    assert "several places" in str(cnn_ext.conversion_report(net))


def test_a_chain_is_fused_where_all_of_it_is_selected():
    net = cnn_ext.convert(chains(), fuse=True, skip={"1", "2", "3.0"})
    assert [type(net[i]) for i in (0, 1, 2)] == [cnn_ext.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert type(net[3][0]) is nn.Conv2d and net[4].pool_size == 1


def test_only_torchs_own_sequential_says_the_order():
    class Backwards(nn.Sequential):
        def forward(self, input):
            for layer in reversed(self):
                input = layer(input)
            return input

    net = cnn_ext.convert(Backwards(nn.Conv2d(1, 1, 3), nn.ReLU()), fuse=True)
    assert type(net[0]) is cnn_ext.Conv2d


def test_a_fused_layer_of_ones_own_is_not_reverted():
    with pytest.raises(ValueError, match="ConvReLUPool2d"):
        cnn_ext.revert(nn.Sequential(cnn_ext.ConvReLUPool2d(1, 1, 3)))


@pytest.mark.parametrize(
    "layer",
    [
        cnn_ext.Conv2d(1, 1, 3, padding="full"),
        cnn_ext.Conv2d(1, 1, 3, padding="same", stride=2),
        cnn_ext.Conv2d(1, 1, 3, padding=((0, 1), (0, 0))),
        cnn_ext.MaxPool2d(2, padding="same"),
        cnn_ext.AvgPool2d(2, padding=((0, 1), (0, 1))),
    ],
    ids=str,
)
def test_what_torch_cannot_do_is_not_reverted(layer):
    net = nn.Sequential(cnn_ext.MaxPool2d(2), copy.deepcopy(layer))
    with pytest.raises(ValueError, match="padding"):
        cnn_ext.revert(net)
    assert type(net[0]) is cnn_ext.MaxPool2d  # nothing was changed


def test_the_report_says_who_computes_what():
    net = nn.Sequential(model(), nn.AdaptiveAvgPool3d(1), nn.Conv3d(1, 1, 1), nn.Conv1d(1, 1, 1))
    cnn_ext.convert(net, skip={"0.2"})
    report = cnn_ext.conversion_report(net)
    assert [(row.name, row.layer, row.converted) for row in report] == [
        ("0.0", "Conv2d", True),
        ("0.2", "MaxPool2d", False),
        ("0.3.0", "OwnForward", False),
        ("0.3.1", "AvgPool2d", True),
        ("1", "AdaptiveAvgPool3d", False),
        ("2", "Conv3d", False),
        ("3", "Conv1d", True),
    ]
    who = ["cnn_ext", "not", "own", "cnn_ext", "no", "no", "cnn_ext"]
    for line, words in zip(str(report).splitlines(), who, strict=True):
        assert words in line
