"""Fixtures of all tests: fixed seeds, and the number of threads put back."""

import random

import numpy
import pytest
import torch

# The modules that take a minute or more, first, so that at the end no process works on one of them while others idle.
LONGEST = ("test_bits", "test_kernels", "test_cuda_emulation", "test_benchmarks", "test_kernel_check", "test_mnist_cli")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the modules that have most tests
    if hasattr(config, "workerinput"):  # one of several processes, each with a core of its own
        torch.set_num_threads(1)
    config.addinivalue_line("markers", "slow: more than five seconds; deselect with -m 'not slow'")
    config.addinivalue_line("markers", "everything: minutes; only with --everything, as `make test-all` runs it")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="also the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("everything"):
        left_out = [item for item in items if item.get_closest_marker("everything")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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
