"""The generated calls of ``tests/parity``: a sample of them, and with ``make test-all`` all."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.beyond import is_accepted
from tests.parity.draws import FUNCTIONS, draw_call

ROOT = Path(__file__).parent.parent
SAMPLE, EVERYTHING = 4000, 26_000


def compare(calls: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.parity", "--calls", str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" calls, 0 differences")


def test_a_sample_of_generated_calls_equals_torch():
    compare(SAMPLE)


@pytest.mark.everything
def test_every_generated_call_equals_torch():
    compare(EVERYTHING)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_is_a_function_of_its_number(function):
    assert str(draw_call(function, 7)) == str(draw_call(function, 7)) != str(draw_call(function, 8))


def test_what_is_accepted_beyond_torch_is_in_the_table():
    assert is_accepted("conv2d", "padding='same' is not supported for strided convolutions")
    assert not is_accepted("conv_transpose2d", "padding='same' is not supported for strided convolutions")
    assert not is_accepted("conv2d", "non-positive stride is not supported")
