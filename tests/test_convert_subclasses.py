"""Which subclasses of torch's layers convert swaps, and that a layer keeps all it had."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import cnn_ext

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(2, 2, 6, 6)


class Plain(nn.Conv2d):
    """Adds to torch's layer, and leaves the computation to it."""

    def __init__(self, *arguments, name="plain"):
        super().__init__(*arguments)
        self.name = name

    def extra_repr(self):
        return f"{super().extra_repr()}, name={self.name}"


class PlainPool(nn.MaxPool2d):
    pass


class Deeper(Plain):
    pass


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight, bias)


def assert_close(got, wanted):
    tolerance = torch.finfo(torch.float32).eps * 32 * max(1.0, wanted.abs().max().item())  # sums of 19 terms
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("layer", "ours"),
    [
        (Plain(2, 3, 3, name="a"), cnn_ext.Conv2d),
        (Deeper(2, 3, 3), cnn_ext.Conv2d),
        (PlainPool(2), cnn_ext.MaxPool2d),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_that_leaves_the_computation_to_torch_is_swapped(layer, ours):
    layer = copy.deepcopy(layer)
    original, printed, wanted = type(layer), str(layer), layer(IMAGES)
    cnn_ext.convert(layer)
    assert isinstance(layer, original) and isinstance(layer, ours) and str(layer) == printed
    assert cnn_ext.conversion_report(layer)[0].converted
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert_close(twin(IMAGES), wanted)
    assert type(cnn_ext.revert(layer)) is original
    assert torch.equal(layer(IMAGES), wanted)


def layer_with_its_own_method(name):
    layer = nn.Conv2d(2, 3, 3)
    setattr(layer, name, getattr(OwnConvForward(2, 3, 3), name))
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        OwnForward(2, 3, 3),
        OwnConvForward(2, 3, 3),
        layer_with_its_own_method("forward"),
        layer_with_its_own_method("_conv_forward"),
    ],
    ids=["forward", "_conv_forward", "forward of the object", "_conv_forward of the object"],
)
def test_a_layer_with_a_forward_of_its_own_is_left_alone(layer):
    before, wanted = type(layer), layer(IMAGES)
    cnn_ext.convert(layer)
    assert type(layer) is before and torch.equal(layer(IMAGES), wanted)
    (row,) = cnn_ext.conversion_report(layer)
    assert not row.converted and "own" in row.reason


def test_torchs_quantisation_aware_layer_is_left_alone():
    qat = pytest.importorskip("torch.ao.nn.qat")
    layer = qat.Conv2d(2, 3, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))
    assert type(cnn_ext.convert(layer)) is qat.Conv2d


REPARAMETRISED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_a_parametrized_layer(name, when):
    layer = nn.Conv2d(2, 3, 3).eval()  # in which spectral_norm makes no step of its iteration
    if when == "after":
        cnn_ext.convert(layer)
    REPARAMETRISED[name](layer)
    parametrised, wanted, state = type(layer).__name__, F.conv2d(IMAGES, layer.weight, layer.bias), layer.state_dict()
    cnn_ext.convert(layer)
    assert isinstance(layer, cnn_ext.Conv2d) and type(layer).__name__ == parametrised
    assert list(layer.state_dict()) == list(state)
    assert_close(layer(IMAGES), wanted)
    assert all(p.grad is not None for p in layer.parameters() if layer(IMAGES).sum().backward() is None)
    twin = copy.deepcopy(layer)
    assert_close(twin(IMAGES), wanted)
    assert not isinstance(cnn_ext.revert(twin), cnn_ext.Conv2d) and parametrize.is_parametrized(twin)
    assert torch.equal(twin(IMAGES), twin(IMAGES))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is cnn_ext.Conv2d
    assert_close(layer(IMAGES), wanted)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_the_older_weight_norm():
    layer = weight_norm(nn.Conv2d(2, 3, 3))
    wanted = layer(IMAGES)
    assert_close(cnn_ext.convert(layer)(IMAGES), wanted)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_keeps_dtype_format_mode_buffers_and_what_is_frozen(format, dtype):
    layer = nn.Conv2d(2, 3, 3, dtype=dtype).to(memory_format=format).eval()
    layer.register_buffer("count", torch.tensor(3))
    layer.bias.requires_grad_(False)
    held = {name: value for name, value in vars(layer).items()}
    tensors = [*layer.parameters(), *layer.buffers()]
    cnn_ext.convert(layer)
    assert vars(layer) == held
    assert all(one is other for one, other in zip(tensors, [*layer.parameters(), *layer.buffers()], strict=True))
    assert layer.weight.dtype == dtype and layer.weight.is_contiguous(memory_format=format)
    assert not layer.training and not layer.bias.requires_grad


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2))
    output = cnn_ext.convert(model)(torch.empty(1, 2, 8, 8, device="meta"))
    assert output.is_meta and output.shape == (1, 3, 3, 3)
