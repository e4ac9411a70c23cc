"""The table of kernels as Python sees it, forcing a row, explaining a call, and the report on the build."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import cnn_ext

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_follow_the_grammar():
    rows = cnn_ext.kernels()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.name == f"{row.op}_{row.direction}_{row.algorithm}_{row.isa}"
        assert row.algorithm and row.device in ("cpu", "cuda")


def test_every_slot_ends_with_the_naive_row():
    last = {(row.op, row.direction): row.algorithm for row in cnn_ext.kernels() if row.device == "cpu"}
    assert set(last.values()) == {"naive"} and len(last) == 19


def test_a_forced_kernel_runs_and_is_restored():
    input, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    chosen = cnn_ext.explain(input, weight).kernel
    with cnn_ext.force_kernel("conv2d_forward_naive_baseline"):
        assert cnn_ext.explain(input, weight).kernel == "conv2d_forward_naive_baseline"
        assert cnn_ext.explain(input, weight, direction="backward_input").kernel != "conv2d_forward_naive_baseline"
        cnn_ext.functional.conv2d(input, weight)
    assert cnn_ext.explain(input, weight).kernel == chosen


def test_a_forced_kernel_is_restored_after_an_error():
    input, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    chosen = cnn_ext.explain(input, weight).kernel
    with pytest.raises(ZeroDivisionError), cnn_ext.force_kernel("conv2d_forward_naive_baseline"):
        raise ZeroDivisionError
    assert cnn_ext.explain(input, weight).kernel == chosen


def test_an_unknown_kernel_cannot_be_forced():
    with pytest.raises(ValueError, match="conv2d_forward_magic"), cnn_ext.force_kernel("conv2d_forward_magic"):
        pass


@pytest.mark.parametrize("direction", ["forward", "backward_input", "backward_weight", "backward_bias"])
def test_explanations(direction):
    input, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3), torch.randn(6)
    explanation = cnn_ext.explain(input, weight, bias, 1, 1, groups=2, direction=direction)
    assert explanation.kernel.startswith(f"conv2d_{direction}_") and explanation.kernel.endswith(explanation.isa)
    assert explanation.threads >= 1 and explanation.workspace_bytes >= 0
    table = str(explanation)
    for field in dataclasses.fields(explanation):
        assert field.name.removesuffix("_bytes") in table


def test_flops_count_the_taps_inside_the_input():
    ones = torch.ones(2, 4, 9, 8)
    for arguments in ({}, {"padding": 1}, {"stride": 2, "padding": (2, 1)}, {"dilation": 2, "padding": 3}):
        weight = torch.ones(6, 4, 3, 3)
        multiplications = cnn_ext.functional.conv2d(ones, weight, **arguments).sum().item()
        explanation = cnn_ext.explain(ones, weight, **arguments)
        assert explanation.flops == 2 * multiplications
        outputs = cnn_ext.functional.conv2d(ones, weight, **arguments).numel()
        assert explanation.bytes == 4 * (ones.numel() + weight.numel() + outputs)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="direction"):
        cnn_ext.explain(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3), direction="sideways")


def test_explain_checks_as_conv2d_does():
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        cnn_ext.explain(torch.randn(1, 2, 4, 4), torch.randn(1, 3, 3, 3))


def test_build_info():
    info = cnn_ext.build_info()
    assert info["torch"] == torch.__version__
    assert info["isa"] in info["isas"]
    assert "omp" in info["openmp"]
    assert info["version"] == cnn_ext.__version__
    cuda = info["cuda"]
    assert ("CNN_EXT_CUDA" in cuda) if isinstance(cuda, str) else {"toolkit", "archs", "proven"} <= set(cuda)


def test_the_command_prints_it_and_tests_itself():
    run = subprocess.run([sys.executable, "-m", "cnn_ext.info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert cnn_ext.build_info()["source_hash"] in run.stdout
    assert "self-test: passed" in run.stdout


def test_a_failed_self_test_is_reported(monkeypatch, capsys):
    from cnn_ext import info

    monkeypatch.setattr(info, "_agrees", lambda got, wanted: False)
    assert info.main() == 1
    assert "self-test: FAILED: conv2d" in capsys.readouterr().out


def test_without_torch_one_line_says_so():
    code = "import sys; sys.modules['torch'] = None; import cnn_ext"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == "ImportError: cnn_ext needs PyTorch >= 2.6: pip install torch"
