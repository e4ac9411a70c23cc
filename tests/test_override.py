"""override() and convert(functional=True): functions of torch caught where a forward calls them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnn_ext
import cnn_ext.functional as C
from cnn_ext import _native

pytestmark = pytest.mark.usefixtures("one_thread")


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation, as timm writes it: F.conv2d in a forward of its own."""

    def forward(self, input):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        ).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Model(nn.Module):
    """Functions called by name, by torch's layers and by a layer with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = StandardisedConv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

    def forward(self, images, *, scale=1.0):
        hidden = F.max_pool2d(self.first(images).relu(), 2)
        hidden = F.avg_pool2d(self.second(hidden), 2, ceil_mode=True)
        return scale * hidden.flatten(1)


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []
    for name in [name for name in vars(_native) if name.endswith("_forward")]:
        kernel = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    return calls


def outcome(model, images):
    output = model(images, scale=2.0)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


def assert_close(got, wanted):
    for one, other in zip(got, wanted, strict=True):  # sums of up to 1000 terms, two layers of them
        tolerance = torch.finfo(torch.float32).eps * 2000 * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


OURS = ["conv2d_forward", "max_pool2d_forward", "conv2d_forward", "avg_pool2d_forward"]


def test_override_catches_what_a_forward_calls(kernel_calls):
    model, images = Model(), torch.randn(2, 1, 12, 12)
    wanted = outcome(model, images)
    assert kernel_calls == []
    with cnn_ext.override():
        got = outcome(model, images)
    assert kernel_calls == OURS
    assert_close(got, wanted)
    model(images)
    assert kernel_calls == OURS


IMAGES = torch.arange(36.0).reshape(1, 1, 6, 6)
CALLS = {
    "F.conv2d": lambda: F.conv2d(IMAGES, IMAGES[:, :, :3, :3], padding="same"),
    "torch.conv2d": lambda: torch.conv2d(IMAGES, weight=IMAGES[:, :, :3, :3]),
    "F.conv1d": lambda: F.conv1d(IMAGES[0], torch.ones(2, 6, 3)),
    "F.max_pool2d": lambda: F.max_pool2d(IMAGES, 2, stride=1),
    "F.max_pool2d with indices": lambda: F.max_pool2d(IMAGES, 2, return_indices=True),
    "F.max_pool2d_with_indices": lambda: F.max_pool2d_with_indices(IMAGES, 2),
    "torch.max_pool2d": lambda: torch.max_pool2d(IMAGES, 2),
    "F.max_pool1d with indices": lambda: F.max_pool1d(IMAGES[0], 2, return_indices=True),
    "F.avg_pool2d": lambda: F.avg_pool2d(IMAGES, 2, count_include_pad=False, padding=1),
    "torch.avg_pool1d": lambda: torch.avg_pool1d(IMAGES[0], 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_is_caught(name, kernel_calls):
    wanted = CALLS[name]()
    with cnn_ext.override():
        got = CALLS[name]()
    assert len(kernel_calls) == 1
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, wanted)), strict=True):
        assert torch.equal(one, other)  # small integers: every sum is exact


def test_every_function_that_torch_has_too_is_caught():
    shared = [name for name in C.__all__ if hasattr(F, name)]
    assert {"conv2d", "max_pool2d", "avg_pool2d"} <= set(shared)
    from cnn_ext.override import _REPLACEMENTS

    assert all(_REPLACEMENTS[getattr(F, name)] is getattr(C, name) for name in shared)


def test_what_is_not_served_is_refused():
    with cnn_ext.override(), pytest.raises(NotImplementedError, match="ComplexFloat"):
        F.conv2d(torch.ones(1, 1, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 3, 3, dtype=torch.complex64))


def test_a_converted_model_runs_under_override(kernel_calls):
    images = torch.randn(2, 1, 12, 12)
    model = Model()
    wanted, state = outcome(model, images), list(model.state_dict())
    assert cnn_ext.convert(model, functional=True) is model
    assert isinstance(model, Model) and type(model).__name__ == "Model" and type(model.second) is cnn_ext.Conv2d
    assert list(model.state_dict()) == state
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cnn_ext.convert(model)):
        kernel_calls.clear()
        assert_close(outcome(twin, images), wanted)
        assert kernel_calls == OURS
    assert cnn_ext.revert(model) is model
    assert type(model) is Model and type(model.second) is nn.Conv2d
    kernel_calls.clear()
    assert all(torch.equal(one, other) for one, other in zip(outcome(model, images), wanted, strict=True))
    assert kernel_calls == []


def test_the_override_ends_with_a_forward_that_raises(kernel_calls):
    model = cnn_ext.convert(Model(), functional=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 2, 12, 12))
    F.max_pool2d(IMAGES, 2)
    assert kernel_calls == []


def test_torch_compile():
    torch._dynamo.reset()
    model, images = cnn_ext.convert(Model(), functional=True), torch.randn(2, 1, 12, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(outcome(compiled, images), outcome(model, images))


def test_a_selection_contradicts_it():
    with pytest.raises(ValueError, match="neither only nor skip"):
        cnn_ext.convert(Model(), functional=True, skip={"first"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(ValueError, match="TorchScript"):
        cnn_ext.convert(torch.jit.script(nn.Sequential(nn.ReLU())), functional=True)
