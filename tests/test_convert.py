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


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())


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
    notes = {row.name: row.note for row in cnn_ext.conversion_report(net)}
    assert notes["0"] == "fused with 1, 2" and notes["4"] == "fused with 5"
    assert notes["3.0"] == "padding_mode='reflect': computed with 3.1, one after the other"
    assert [notes[name] for name in ("2", "3.2", "5")] == ["computed with 0", "", "computed with 4"]
    assert list(net.state_dict()) == state and [id(p) for p in net.parameters()] == parameters
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for got, torchs in zip(outcome(twin, images), wanted, strict=True):
            # Two layers of sums of up to 512 terms.
            tolerance = torch.finfo(torch.float32).eps * 1024 * torchs.abs().max().item()
            torch.testing.assert_close(got, torchs, rtol=0, atol=tolerance)
    assert types(cnn_ext.revert(net)) == before
    assert "followers" not in vars(net[0])
    assert all(torch.equal(a, b) for a, b in zip(outcome(net, images), wanted, strict=True))


@pytest.fixture
def forwards(monkeypatch):
    calls = []
    for name in ("conv2d_forward", "conv2d_relu_max_pool2d_forward", "max_pool2d_forward"):
        kernel = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    return calls


def test_what_is_fused_is_not_computed_twice(forwards):
    cnn_ext.convert(chains(), fuse=True)(torch.randn(2, 1, 16, 16))
    fused = "conv2d_relu_max_pool2d_forward"
    # The second one has padding_mode='reflect', which the fused kernels do not read.
    assert forwards == [fused, "conv2d_forward", "max_pool2d_forward", fused]


def test_hooks_stand_in_the_way_of_fusion():
    hooked, seen = chains(), []
    hooked[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    hooked[3][1].register_forward_pre_hook(lambda *_: None)
    cnn_ext.convert(hooked, fuse=True)(torch.randn(1, 1, 16, 16))
    assert seen == [(1, 4, 16, 16)]
    assert {row.name: row.note for row in cnn_ext.conversion_report(hooked) if row.note} == {
        "0": "not fused: 0 has hooks",
        "3.0": "not fused: 3.1 has hooks",
        "4": "fused with 5",
        "5": "computed with 4",
    }


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("place", range(3))
def test_a_hook_that_comes_after_the_conversion_is_called(register, place, forwards):
    net, calls = cnn_ext.convert(chains(), fuse=True), []
    handle = getattr(net[place], f"register_{register}")(lambda *_: calls.append(place))
    net(torch.randn(1, 1, 16, 16, requires_grad=True)).sum().backward()
    assert calls == [place]
    handle.remove()
    forwards.clear()
    net[:3](torch.randn(1, 1, 16, 16))
    assert calls == [place] and forwards == ["conv2d_relu_max_pool2d_forward"]


def test_a_layer_of_a_fused_chain_computes_its_own_part():
    net = chains()
    images = torch.randn(2, 1, 16, 16)
    fused = cnn_ext.convert(net, inplace=False, fuse=True)
    cnn_ext.convert(net)
    with torch.no_grad():
        for start in range(6):
            for stop in range(start + 1, 7):
                features = images if start == 0 else net[:start](images)
                assert torch.equal(fused[start:stop](features), net[start:stop](features)), (start, stop)
        one_by_one = images
        for layer in fused:
            one_by_one = layer(one_by_one)
        assert torch.equal(one_by_one, net(images))


def test_a_fused_chain_is_computed_as_it_stands(forwards):
    """Layers that were replaced, added or taken out after the conversion."""
    net = cnn_ext.convert(chains(), inplace=False, fuse=True)
    images = torch.randn(2, 1, 16, 16)
    net[1] = nn.ReLU6()
    del net[5]
    net.insert(5, nn.Tanh())
    assert net(images).abs().max() <= 1
    assert forwards[0] == "conv2d_forward" and forwards[-1] == "conv2d_forward"
    unfused = copy.deepcopy(net)
    cnn_ext.revert(unfused)
    tolerance = torch.finfo(torch.float32).eps * 1024
    torch.testing.assert_close(net(images), unfused(images), rtol=0, atol=tolerance)


def test_shared_layers_are_fused_wherever_they_stand(forwards):
    conv, relu = nn.Conv2d(1, 1, 3), nn.ReLU()
    theirs = nn.Sequential(conv, relu, nn.Conv2d(1, 1, 3), relu, conv, nn.MaxPool2d(2))
    ours = cnn_ext.convert(copy.deepcopy(theirs), fuse=True)
    images = torch.randn(1, 1, 12, 12)
    for got, wanted in zip(outcome(ours, images), outcome(theirs, images), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1000 * torch.finfo(torch.float32).eps * wanted.abs().max())
    assert forwards == ["conv2d_relu_max_pool2d_forward"] * 2 + ["conv2d_forward", "max_pool2d_forward"]


def test_fused_and_overridden_there_and_back():
    net = cnn_ext.convert(chains(), fuse=True, functional=True)
    images = torch.randn(1, 1, 16, 16)
    wanted = net(images)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is type(net) and torch.equal(twin(images), wanted)
    assert type(cnn_ext.revert(net)) is nn.Sequential


def test_a_fused_subclass_of_sequential_pickles_as_what_it_was():
    net = cnn_ext.convert(Block(), fuse=True)
    images = torch.randn(1, 1, 8, 8)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is type(net) and isinstance(twin, Block) and torch.equal(twin(images), net(images))
    assert type(cnn_ext.revert(net)) is Block


def test_a_chain_is_fused_where_all_of_it_is_selected():
    net = cnn_ext.convert(chains(), fuse=True, skip={"1", "2", "3.0"})
    assert [type(net[i]) for i in (0, 1, 2)] == [cnn_ext.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert type(net[3][0]) is nn.Conv2d
    assert {row.name: row.note for row in cnn_ext.conversion_report(net) if "fused" in row.note} == {
        "4": "fused with 5"
    }


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
