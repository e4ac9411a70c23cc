"""tune_malloc: freed memory stays in the process, and whoever cannot be tuned says so."""

import ctypes
import platform
import resource
import subprocess
import sys

import cnn_ext
from cnn_ext import allocator

# Page faults of 20 tensors of 64 MB, one after the other, in a fresh process. By itself glibc never keeps blocks of
# more than 32 MB.
FAULTS = """
import resource, sys, torch
import cnn_ext
took_effect = cnn_ext.tune_malloc() if sys.argv[1] == "tuned" else False
def fill():
    torch.ones(16 << 20)
fill()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(took_effect, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", FAULTS, mode]
    took_effect, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return took_effect == "True", int(count)


def test_freed_memory_stays():
    took_effect, tuned = faults("tuned")
    assert took_effect == (platform.libc_ver()[0] == "glibc")
    if took_effect:
        pages_of_a_tensor = (64 << 20) // resource.getpagesize()
        # A few times the blocks may move, where small ones come to lie between them.
        assert tuned < 10 * pages_of_a_tensor, "most tensors' pages came anew although freed memory was to stay"


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_file_of", lambda process, function: function.encode())
    assert cnn_ext.tune_malloc() is False


def test_another_libc_is_left_alone(monkeypatch):
    class Process:
        dladdr = ctypes.CDLL(None).dladdr

        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Process())
    assert cnn_ext.tune_malloc() is False
