"""Comparing what bad input raises with what torch raises."""

import re

import pytest
import torch.nn.functional as F

import cnn_ext.functional as C


def raised(function, arguments):
    with pytest.raises(Exception) as info:
        function(*arguments)
    return info.value


def core(message: str) -> str:
    """What of torch's message has to reappear: its first line, without the advice on MKLDNN tensors."""
    line = message.splitlines()[0].split(" or input should be a MKLDNN")[0]
    return line.removesuffix("=[]")


def assert_raises_as_torch(op: str, arguments, own_words: str | None = None) -> None:
    """Asserts an exception of torch's type whose message holds torch's text, or ``own_words`` instead of it."""
    torchs, ours = raised(getattr(F, op), arguments), raised(getattr(C, op), arguments)
    assert type(ours) is type(torchs), f"{ours!r} instead of {torchs!r}"
    if isinstance(torchs, TypeError):  # torch lists its overloads; here the argument is named
        assert re.search(r"argument '\w+' must be", str(ours)), ours
        return
    assert (own_words or core(str(torchs))) in str(ours), f"{ours!r} instead of {torchs!r}"
