"""pack(): the same bits from weights packed once, packed anew whenever they may be others, and nothing that grows."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import cnn_ext
from cnn_ext import _native

pytestmark = pytest.mark.usefixtures("one_thread")

# Layers and inputs for each kind of row that packs, and for one that does not (depthwise).
LAYERS = {
    "direct": (lambda: cnn_ext.Conv2d(16, 40, 3, padding=1), (2, 16, 9, 9)),
    "strided": (lambda: cnn_ext.Conv2d(5, 33, (3, 5), stride=2, dilation=(1, 2), bias=False), (2, 5, 15, 17)),
    "long sums": (lambda: cnn_ext.Conv2d(300, 20, 3, padding=1), (1, 300, 5, 5)),
    "short sums": (lambda: cnn_ext.Conv2d(3, 16, 3, stride=2, padding=1), (2, 3, 12, 60)),
    "pixels": (lambda: cnn_ext.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), (2, 8, 12, 40)),
    "grouped": (lambda: cnn_ext.Conv2d(12, 40, 3, groups=2), (2, 12, 9, 9)),
    "pointwise": (lambda: cnn_ext.Conv2d(300, 70, 1), (2, 300, 5, 5)),
    "pointwise, large map": (lambda: cnn_ext.Conv2d(6, 17, 1), (1, 6, 40, 40)),
    "depthwise": (lambda: cnn_ext.Conv2d(16, 16, 3, groups=16), (2, 16, 9, 9)),
    "one axis": (lambda: cnn_ext.Conv1d(16, 40, 3, padding=1), (2, 16, 30)),
    "pooled": (lambda: cnn_ext.ConvReLUPool2d(16, 40, 3, padding=1), (2, 16, 10, 10)),
    "with ReLU": (lambda: cnn_ext.ConvReLUPool2d(16, 40, 3, padding=1, pool_size=1), (2, 16, 10, 10)),
    "pixels with ReLU": (lambda: cnn_ext.ConvReLUPool2d(8, 4, 3, padding=1, pool_size=1), (2, 8, 12, 40)),
}
KEEP_NOTHING = {"depthwise"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(name, dtype=torch.float32):
    layer, size = LAYERS[name]
    return layer().to(dtype).eval(), torch.randn(size).to(dtype)


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits(name, dtype, channels_last, without_gradients):
    layer, input = make(name, dtype)
    if channels_last and input.dim() == 4:
        layer, input = (each.to(memory_format=torch.channels_last) for each in (layer, input))
    wanted = layer(input)
    assert cnn_ext.pack(layer) is layer
    for _ in range(3):
        output = layer(input)
        assert torch.equal(output, wanted) and output.stride() == wanted.stride()
    if dtype in (torch.float32, torch.float64):
        is_composed = isinstance(layer, cnn_ext.ConvReLUPool2d) and dtype == torch.float64
        assert (layer.packing.bytes == 0) == (name in KEEP_NOTHING or is_composed)
        assert layer.packing.bytes == 0 or layer.packing.bytes >= layer.weight.nbytes
    unbatched = input[0]
    assert torch.equal(layer(unbatched), wanted[0])


def packings(monkeypatch):
    """The packed weights that were made."""
    made = []
    monkeypatch.setattr("cnn_ext.ops.packing.PackedWeight", lambda: made.append(_native.PackedWeight()) or made[-1])
    return made


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "an optimiser": lambda layer: (
        setattr(layer.weight, "grad", torch.ones_like(layer.weight)),
        torch.optim.SGD([layer.weight], 0.1).step(),
    ),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "load_state_dict(assign=True)": lambda layer: layer.load_state_dict(
        {k: v + 1 for k, v in layer.state_dict().items()}, assign=True
    ),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "there and back": lambda layer: layer.bfloat16().float(),
    "data": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "transposed": lambda layer: setattr(layer.weight, "data", layer.weight.data.transpose(0, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(change, without_gradients):
    layer = cnn_ext.pack(cnn_ext.Conv2d(24, 24, 3, padding=1).eval())
    input = torch.randn(1, 24, 9, 9)
    layer(input)
    CHANGES[change](layer)
    plain = cnn_ext.revert(copy.deepcopy(layer))
    assert not hasattr(plain, "packing")
    assert torch.equal(layer(input), cnn_ext.convert(plain)(input))


def test_memory_is_not_taken_for_another_tensors(without_gradients):
    """A weight that is freed and comes back at the same address is another one."""
    layer = cnn_ext.pack(cnn_ext.Conv2d(24, 24, 3, padding=1).eval())
    input = torch.randn(1, 24, 9, 9)
    for _ in range(20):
        layer.weight = nn.Parameter(torch.randn(24, 24, 3, 3))
        assert torch.equal(layer(input), cnn_ext.functional.conv2d(input, layer.weight, layer.bias, 1, 1))


def test_packed_once(monkeypatch, without_gradients):
    made = packings(monkeypatch)
    layer = cnn_ext.pack(cnn_ext.Conv2d(16, 40, 3, padding=1).eval())
    for size in (9, 10, 20, 9):  # the form does not depend on the size of the map
        layer(torch.randn(2, 16, size, size))
    assert len(made) == 1
    layer.weight.add_(1)
    layer(torch.randn(2, 16, 9, 9))
    assert len(made) == 2 and made[0].bytes == made[1].bytes


def test_no_more_than_one_form_is_kept(without_gradients):
    """Large and small maps of a pointwise layer, whose channels suffice, are packed in different forms."""
    forms = []
    for channels in (6, 40):
        layer = cnn_ext.Conv2d(channels, 70, 1).eval()
        inputs = [torch.randn(1, channels, size, size) for size in (2, 40, 3, 64)]
        wanted = [layer(input) for input in inputs]
        cnn_ext.pack(layer)
        sizes = set()
        for _ in range(2):
            for input, output in zip(inputs, wanted, strict=True):
                assert torch.equal(layer(input), output)
                sizes.add(layer.packing.bytes)
        assert max(sizes) <= 8 * layer.weight.nbytes
        forms.append(len(sizes))
    assert max(forms) == 2


def test_gradients_and_training_keep_nothing(monkeypatch):
    made = packings(monkeypatch)
    layer = cnn_ext.pack(cnn_ext.Conv2d(16, 40, 3, padding=1))
    input = torch.randn(2, 16, 9, 9)
    layer(input).sum().backward()
    layer.eval()(input).sum().backward()
    assert not made and layer.weight.grad is not None
    with torch.inference_mode():
        layer(input)
        assert len(made) == 1 and layer.packing.bytes > 0
        layer.train()(input)
        assert layer.packing.bytes == 0


def test_not_finite_weights_keep_nothing(without_gradients):
    layer = cnn_ext.Conv2d(16, 40, 3, padding=1).eval()
    layer.weight[3, 2, 0, 0] = torch.inf
    input = torch.randn(2, 16, 9, 9)
    wanted = layer(input)
    cnn_ext.pack(layer)
    for _ in range(2):
        torch.testing.assert_close(layer(input), wanted, rtol=0, atol=0, equal_nan=True)
    assert layer.packing.bytes == 0


def chain():
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)),
    )
    for norm in (net[1], net[5]):
        nn.init.normal_(norm.weight), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return cnn_ext.convert(net.eval(), fuse=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_folded_normalisation_is_kept(mode, monkeypatch):
    net, input = chain(), torch.randn(2, 3, 12, 12)
    with mode():
        wanted = net(input)
    made = packings(monkeypatch)
    cnn_ext.pack(net)
    with mode():
        for _ in range(3):
            assert torch.equal(net(input), wanted)
    assert len(made) == 2
    changes = (
        lambda: net[1].weight.mul_(2),
        lambda: net[1].running_var.mul_(2),
        lambda: setattr(net[1], "eps", 0.5),
        lambda: net[5].load_state_dict({k: v + 1 for k, v in net[5].state_dict().items()}),
        lambda: net[4].weight.add_(1),
    )
    for number, change in enumerate(changes, start=3):
        with torch.no_grad():
            change()
            plain = copy.deepcopy(net)
        for layer in plain:
            layer.__dict__.pop("packing", None)
        with mode():
            assert torch.equal(net(input), plain(input))
        assert len(made) == number


def test_gradients_of_a_packed_chain():
    net, input = chain(), torch.randn(2, 3, 12, 12)
    wanted = torch.autograd.grad(net(input).sum(), list(net.parameters()))
    cnn_ext.pack(net)
    with torch.no_grad():
        net(input)
    got = torch.autograd.grad(net(input).sum(), list(net.parameters()))
    assert all(map(torch.equal, got, wanted))


def test_what_surrounds_it():
    net, input = cnn_ext.pack(chain()), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        wanted = net(input)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.fx.symbolic_trace(net)):
            assert torch.equal(twin(input), wanted)
        assert copy.deepcopy(net)[0].packing.bytes == 0
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(input), wanted)
        weights = dict(net.named_parameters())
        mapped = torch.func.vmap(lambda image: torch.func.functional_call(net, weights, (image[None],))[0])(input)
        torch.testing.assert_close(mapped, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(input)
        assert half.dtype == torch.bfloat16
    assert list(net.state_dict()) == list(cnn_ext.revert(copy.deepcopy(net)).state_dict())
    assert not any(hasattr(layer, "packing") for layer in cnn_ext.revert(net))


def test_what_is_not_packed():
    layer = cnn_ext.Conv2d(3, 16, 3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    net = nn.Sequential(layer, cnn_ext.ConvTranspose2d(16, 3, 3), nn.Conv2d(3, 3, 3))
    cnn_ext.pack(net)
    assert not any("packing" in vars(module) for module in net)
    with pytest.raises(ValueError, match="convolutions of cnn_ext"):
        cnn_ext.pack(nn.Conv2d(1, 1, 1))


def test_threads_share_a_layer():
    """Each thread's calls have forms of their own, which replace each other's."""
    layer = cnn_ext.Conv2d(6, 70, 1).eval()
    inputs = [torch.randn(1, 6, size, size) for size in (2, 40)]
    with torch.no_grad():
        wanted = [layer(input) for input in inputs]
    cnn_ext.pack(layer)
    wrong = []

    def work(input, output):
        with torch.no_grad():
            wrong.extend(i for i in range(300) if not torch.equal(layer(input), output))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
