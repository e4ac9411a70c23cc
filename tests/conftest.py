"""Fixtures of all tests: fixed seeds, the number of threads put back, and the devices that there are."""

import random

import numpy
import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: more than five seconds; deselect with -m 'not slow'")


@pytest.fixture(autouse=True)
def fixed_state():
    """Seeds before each test, and torch's global settings as they were after it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def one_thread() -> None:
    """For tests of many tiny tensors: on a busy machine a team of threads waits longer than it works."""
    torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    return torch.device(request.param)
