"""The layers are torch's but for who computes: repr, parameters, initialisation, state_dict, constructor's errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cnn_ext

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONS = [
    dict(kernel_size=3),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=3, padding="valid", dtype=torch.float64),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=(1, 2), padding_mode="replicate"),
    dict(kernel_size=3, padding=1, padding_mode="circular"),
]


def close(got, wanted, terms):
    """Within eps * terms * the largest magnitude."""
    tolerance = torch.finfo(wanted.dtype).eps * terms * wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_conv2d_is_a_drop_in(arguments):
    torch.manual_seed(1)
    ours = cnn_ext.Conv2d(4, 6, **arguments)
    torch.manual_seed(1)
    torchs = nn.Conv2d(4, 6, **arguments)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(torchs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    input = torch.randn(2, 4, 9, 8, dtype=ours.weight.dtype)
    close(ours(input), torchs(input), terms=37)


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_state_dict_both_ways(arguments):
    ours, torchs = cnn_ext.Conv2d(4, 6, **arguments), nn.Conv2d(4, 6, **arguments)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(torchs.weight, ours.weight)
    fresh = cnn_ext.Conv2d(4, 6, **arguments)
    fresh.load_state_dict(torchs.state_dict())
    assert torch.equal(fresh.weight, ours.weight)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MaxPool2d", dict(kernel_size=2)),
        ("MaxPool2d", dict(kernel_size=(3, 2), stride=1, padding=1, dilation=1, ceil_mode=True)),
        ("MaxPool2d", dict(kernel_size=3, stride=2, dilation=2, return_indices=True)),
        ("AvgPool2d", dict(kernel_size=2)),
        ("AvgPool2d", dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)),
        ("AvgPool2d", dict(kernel_size=(3, 2), divisor_override=5)),
    ],
    ids=str,
)
def test_pools_are_drop_ins(name, arguments):
    ours, torchs = getattr(cnn_ext, name)(**arguments), getattr(nn, name)(**arguments)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(torchs)
    input = torch.randn(2, 3, 9, 8)
    got, wanted = ours(input), torchs(input)
    if arguments.get("return_indices"):
        assert torch.equal(got[1], wanted[1])
        got, wanted = got[0], wanted[0]
    close(got, wanted, terms=9)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(groups=0),
        dict(groups=3),
        dict(padding="SAME"),
        dict(padding="same", stride=2, padding_mode="reflect"),
        dict(padding_mode="mirror"),
    ],
    ids=str,
)
def test_constructor_errors_are_of_torchs_type(arguments):
    with pytest.raises(ValueError):
        nn.Conv2d(4, 6, 3, **arguments)
    with pytest.raises(ValueError):
        cnn_ext.Conv2d(4, 6, 3, **arguments)


@pytest.mark.parametrize(
    ("padding", "stride", "size"),
    [("same", 2, (5, 4)), ("same_lower", 2, (5, 4)), ("full", 1, (11, 10)), (((1, 0), (0, 2)), 1, (8, 8))],
    ids=str,
)
def test_extended_paddings(padding, stride, size):
    layer = cnn_ext.Conv2d(4, 6, 3, stride=stride, padding=padding)
    assert f"padding={padding!r}".replace("'", "") in repr(layer).replace("'", "")
    input = torch.randn(2, 4, 9, 8)
    assert torch.equal(layer(input), cnn_ext.functional.conv2d(input, layer.weight, layer.bias, stride, padding))
    assert layer(input).shape[2:] == size
    with pytest.raises(ValueError, match="padding_mode"):
        cnn_ext.Conv2d(4, 6, 3, stride=stride, padding=padding, padding_mode="circular")


def test_layers_are_copied_and_pickled():
    layer = cnn_ext.Conv2d(2, 3, 3, padding="same_lower")
    input = torch.randn(1, 2, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is cnn_ext.Conv2d
        assert torch.equal(twin(input), layer(input))
