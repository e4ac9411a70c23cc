"""The benchmarks run, write what they promise, and refuse what they must. No time is asserted."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from PIL import Image

from benchmarks import memory, mnist, plots, report, runner, views
from benchmarks.__main__ import main
from benchmarks.harness import BenchmarkError, Comparison, Effort, check_close, compare, lower_quartile
from benchmarks.machine import NO_FAULT_ALLOCATOR, allocator_environment
from benchmarks.options import Bench
from benchmarks.summary import summarize
from benchmarks.tables import Column, markdown, plain

QUICK = ["--repeats", "1", "--seconds", "0.01"]

COMMON_FIELDS = {"schema", "benchmark", "device", "date", "machine", "versions", "threads", "peak", "rows", "command"}
COMMON_FIELDS |= {"allocator", "figure", "figures_of_runs"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What every benchmark leaves for one tiny problem, and its table as a text file."""
    out = tmp_path_factory.mktemp("results")
    for benchmark, only in (("conv2d", "effnet_se_1x1"), ("pooling", "lenet_avg|ci_tail17"), ("mnist", "")):
        with contextlib.redirect_stdout(io.StringIO()) as table:
            status = main([benchmark, "--only", only, "--out", str(out), "--data-dir", str(out / "none"), *QUICK])
        assert status == 0
        (out / f"{benchmark}.txt").write_text(table.getvalue())
    return out


def load(results: Path, benchmark: str) -> dict:
    document = json.loads((results / f"{benchmark}_cpu_nofault.json").read_text())
    assert document.keys() >= COMMON_FIELDS
    assert document["benchmark"] == benchmark
    assert document["peak"]["fma_gflops"] > 0
    assert f"benchmarks {benchmark} " in document["command"]
    return document


def test_conv2d_measures_each_direction_in_each_layout(results):
    rows = load(results, "conv2d")["rows"]
    assert {(row["direction"], row["layout"]) for row in rows} == {
        (direction, layout)
        for direction in ("forward", "backward_input", "backward_weight")
        for layout in ("nchw", "channels_last")
    }
    for row in rows:
        assert row["kernel"].startswith(f"conv2d_{row['direction']}")
        assert row["flops"] == 2 * 8 * 240 * 10
        assert row["speed_vs_torch"] == pytest.approx(row["torch_ms"] / row["ms"])
        assert row["speed_vs_best"] <= row["speed_vs_torch"]
    assert "geometric mean of all rows" in (results / "conv2d.txt").read_text()


def test_rows_of_one_sample_have_means_of_their_own(results):
    document = load(results, "conv2d")
    assert document["summary"]["one_sample"] == {}  # its layer has a batch of 8
    document["rows"][0]["batch"] = 1
    means = summarize(document["rows"])["one_sample"]
    assert means == {"nchw": {"speed_vs_torch": ANY, "speed_vs_best": ANY, "rows": 1}}
    assert means["nchw"]["speed_vs_best"] == pytest.approx(document["rows"][0]["speed_vs_best"])
    assert "one sample at a time, nchw: " in views.verdict(document["summary"] | {"one_sample": means})


def test_rows_are_checked_one_by_one(tmp_path, capsys):
    name = "avg_pool2d_backward_naive_baseline"
    assert main(["rows", "--only", f"^{name}", "--processes", "2", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "rows_cpu.json").read_text())
    assert [(row["name"], row["failed"], row["right"]) for row in document["rows"]] == [(name, 0, True)]
    assert document["rows"][0]["passed"] > 8  # dtypes and layouts
    assert f"{name} " in capsys.readouterr().out


def test_the_layers_of_networks_are_a_list_of_their_own(tmp_path):
    only = ["--only", "efficientnet_b0_32x1_1x1_8|mobilenet_v2_960x7_3x3_960", "--direction", "forward"]
    assert main(["conv2d", "--layers", "networks", "--layout", "nchw", *only, "--out", str(tmp_path), *QUICK]) == 0
    rows = json.loads((tmp_path / "conv2d_networks_cpu_nofault.json").read_text())["rows"]
    assert {row["class"] for row in rows} == {"one_pixel", "depthwise"}


def test_winograd_is_measured_where_it_serves(tmp_path, capfd):
    quick = ["conv2d", "--winograd", "--out", str(tmp_path), "--layout", "nchw", *QUICK]
    assert main([*quick, "--only", "googlenet_3a_5x5", "--direction", "backward_weight"]) == 0
    document = json.loads((tmp_path / "conv2d_winograd_cpu_nofault.json").read_text())
    assert [("_winograd_" in row["kernel"], row["class"]) for row in document["rows"]] == [(True, "5x5, few channels")]
    readme = tmp_path / "README.md"
    readme.write_text(
        "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("benchmarks", "mnist", "install"))
    )
    report.write(tmp_path, readme)
    assert "| nchw | 5x5, few channels | 1 |" in readme.read_text()
    with pytest.raises(SystemExit):
        main([*quick, "--only", "effnet_se_1x1"])
    assert "none of these layers takes it" in capfd.readouterr().err


def test_all_on_a_cpu_measures_winograd_too(monkeypatch):
    measured = []

    def measure(benchmark, arguments, options):
        measured.append((benchmark, options.winograd, "--winograd" in arguments, options.dtype))
        return []

    monkeypatch.setattr(runner, "measure", measure)
    assert main(["all", "--dtype", "float64"]) == 0
    plain_runs = [(name, False, False, ["float64"]) for name in ("conv2d", "pooling", "mnist", "networks")]
    assert measured == [*plain_runs, ("conv2d", True, True, ["float32"])]


def test_pooling_measures_inference_training_and_backward(results):
    rows = load(results, "pooling")["rows"]
    assert {(row["op"], row["direction"]) for row in rows} == {
        ("max_pool2d", "forward"),
        ("max_pool2d", "forward_training"),
        ("max_pool2d", "backward"),
        ("avg_pool2d", "forward"),
        ("avg_pool2d", "backward"),
    }
    assert all(row["gbytes_per_s"] == pytest.approx(1e-6 * row["bytes"] / row["ms"]) for row in rows)


def test_mnist_compares_a_step_with_both_layouts_of_torch(results):
    rows = load(results, "mnist")["rows"]
    own = ["cnn_ext nchw", "cnn_ext fused nchw", "cnn_ext fused winograd nchw"]
    assert [row["backend"] for row in rows] == ["torch nchw", "torch channels_last", *own]
    assert rows[0]["time_vs_torch"] == 1


def test_pictures_open(results):
    names = {path.name for path in results.glob("*.png")}
    assert names >= {
        "conv2d_cpu_nofault_roofline.png",
        "conv2d_cpu_nofault_speed.png",
        "pooling_cpu_nofault_speed.png",
        "mnist_cpu_nofault_time.png",
    }
    for name in names:
        with Image.open(results / name) as picture:
            picture.load()
            assert min(picture.size) > 200


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is for machines without a GPU")
@pytest.mark.parametrize("command", ["conv2d", "pooling", "mnist", "all"])
def test_cuda_without_a_gpu_is_one_line_and_status_2(command, capsys):
    assert main([command, "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "--device cuda" in printed.err


def test_a_name_that_no_case_has_is_one_line_and_status_2(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["conv2d", "--only", "no such layer", "--out", str(tmp_path)])
    assert ended.value.code == 2
    line = "benchmarks: --only: no name in shapes/conv2d.csv matches 'no such layer'"
    assert capfd.readouterr().err.splitlines() == [line]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("benchmark", "only"), [("conv2d", "effnet_se_1x1"), ("pooling", "ci_tail17"), ("mnist", "")])
def test_a_gpu_is_measured_with_warm_and_with_flushed_caches(benchmark, only, tmp_path):
    names = ["--only", only, "--data-dir", str(tmp_path / "none")]
    assert main([benchmark, "--device", "cuda", *names, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / f"{benchmark}_cuda.json").read_text())
    assert document["peak"]["gemm_gflops"] > 0 and document["failures"] == []
    for row in document["rows"]:
        assert row["launched_ms" if benchmark == "mnist" else "flushed_ms"] > 0


def of_a_gpu(document: dict) -> dict:
    """The document as if a GPU had been measured."""
    rows = [
        row
        | {f"flushed_{name}": row[name] for name in ("ms", "speed_vs_torch", "speed_vs_best")}
        | {"share_of_copy": 0.8}
        for row in document["rows"]
    ]
    gpu = {"device": "cuda", "allocator": None, "rows": rows, "summary": summarize(rows)}
    machine = document["machine"] | {"gpu": "a GPU"}
    return document | gpu | {"machine": machine, "versions": document["versions"] | {"cudnn": 91000}}


def test_results_of_a_gpu_stand_in_the_readme(results, tmp_path):
    document = of_a_gpu(load(results, "pooling"))
    assert "of an equal copy" in views.text(document) and "a GPU, float32 (TF32)" in views.text(document)
    (tmp_path / "pooling_cuda.json").write_text(json.dumps(document))
    assert all(path.is_file() for path in plots.draw(document, tmp_path / "pooling_cuda"))
    rows = [{"name": name, "passed": 8, "failed": name == "b", "right": name != "b"} for name in "ab"]
    kernels = {"benchmark": "rows", "rows": rows, "command": "python -m benchmarks rows --device cuda"}
    (tmp_path / "rows_cuda.json").write_text(json.dumps(document | kernels))
    (tmp_path / "README.md").write_text(README)
    report.write(tmp_path, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "**kernels**, a GPU" in text and "2 in 16 tests against float64, wrong: b" in text
    assert "flushed vs best | of an equal copy |" in text and "![pooling cuda speed]" in text


def test_a_row_that_fails_is_named_and_left_out():
    bench = Bench()

    def refused() -> list[dict]:
        raise NotImplementedError("refused")

    assert bench.rows_of(lambda: [{"ms": 1.0}]) == [{"ms": 1.0}]
    assert bench.rows_of(refused) == [] and bench.failures == ["refused"]


def history(backend: str, seed: int, accuracy: float | None) -> str:
    curves = {f"{part}_{kind}": [0.5, 0.6] for part in ("train", "validation") for kind in ("loss", "accuracy")}
    return json.dumps({"backend": backend, "arguments": {"seed": seed}, "test_accuracy": accuracy, **curves})


def write_images(raw: Path, count: int) -> None:
    """The two training files of MNIST, with random images."""
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for name, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
        values = torch.randint(256 if size > 1 else 10, (count * size,), generator=generator, dtype=torch.uint8)
        (raw / f"train-{name}-ubyte").write_bytes(bytes(header) + values.numpy().tobytes())


def test_the_epoch_of_the_lectures_script_is_timed(tmp_path):
    write_images(tmp_path / "MNIST" / "raw", 60)
    assert mnist.find_data(str(tmp_path)) == tmp_path
    assert mnist.find_data(str(tmp_path / "MNIST")) is None
    script = ["-m", "benchmarks.lecture_script", "--data-dir", str(tmp_path)]
    assert mnist.epoch_seconds([*script, "--images", "60"]) > 0
    with pytest.raises(BenchmarkError, match="ended with status 1: no data"):
        mnist.epoch_seconds(["-c", "raise SystemExit('no data')"])


README = """before
<!-- mnist:begin -->
stale
<!-- mnist:end -->
between
<!-- install:begin -->
<!-- install:end -->
<!-- benchmarks:begin -->
<!-- benchmarks:end -->
after
"""

INSTALL = {
    "machine": {"cpu": "a processor", "cores": 2},
    "date": "2026-01-02 03:04 UTC",
    "command": "python -m benchmarks install",
    "rows": [{"name": "CPU only", "seconds": 61.6, "megabytes": 7.51}],
}


def test_report_writes_between_the_markers_and_nowhere_else(results):
    for seed, accuracy in enumerate((0.9900, 0.9910, 0.9920), 1):
        (results / f"mnist_cnn_ext_seed{seed}.json").write_text(history("cnn_ext", seed, accuracy))
    (results / "install.json").write_text(json.dumps(INSTALL))
    readme = results / "README.md"
    readme.write_text(README)
    report.write(results, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- mnist:begin -->\n") and text.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "stale" not in text
    assert "mean test accuracy 0.9910, standard error 0.0006 (3 seeds)" in text
    assert "0.9914" in text
    assert (
        "| CPU only | 62 | 7.5 |" in text
        and "(2 cores of a processor, 2026-01-02, `python -m benchmarks install`)" in text
    )
    assert "(conv2d_cpu_nofault.json)" in text and "![conv2d cpu nofault roofline]" in text
    with Image.open(results / "mnist_curves.png") as picture:
        picture.load()
    report.write(results, readme)
    assert readme.read_text() == text


def test_records_of_another_machine_stand_below_without_pictures(results, tmp_path):
    for folder in (tmp_path, tmp_path / "another"):
        shutil.copytree(results, folder, ignore=shutil.ignore_patterns("mnist*", "another"), dirs_exist_ok=True)
    (tmp_path / "README.md").write_text(README)
    report.write(tmp_path, tmp_path / "README.md")
    first, another = (tmp_path / "README.md").read_text().split("### another\n")
    assert "![pooling" in first and "(another/pooling_cpu_nofault" in another and "![" not in another.split("<!--")[0]


def test_report_refuses_a_readme_without_markers(tmp_path):
    (tmp_path / "README.md").write_text("nothing here\n")
    with pytest.raises(BenchmarkError, match="benchmarks:begin"):
        report.write(tmp_path, tmp_path / "README.md")


def test_report_refuses_an_unfinished_training_run(tmp_path):
    (tmp_path / "mnist_torch_seed1.json").write_text(history("torch", 1, None))
    (tmp_path / "README.md").write_text(README)
    with pytest.raises(BenchmarkError, match="did not finish"):
        report.write(tmp_path, tmp_path / "README.md")


def test_the_middle_run_is_quoted():
    assert runner._middle([{"figure": f} for f in (3.0, 1.0, 2.0)]) == {
        "figure": 2.0,
        "figures_of_runs": [3.0, 1.0, 2.0],
    }


class CountingTimer:
    """Calls nothing twice, and remembers the order."""

    def __init__(self) -> None:
        self.order = []

    def seconds(self, call, calls: int) -> float:
        self.order.append(call())
        return 1.0


def test_contenders_alternate_and_each_sample_is_kept():
    timer = CountingTimer()
    result = compare({"a": lambda: "a", "b": lambda: "b"}, timer, lambda: 100.0, Effort(repeats=3, seconds=0.3))
    rounds = len(result.peak_gflops)
    assert rounds >= 3
    assert timer.order[4:] == ["a", "b"] * rounds  # after two calls each, for warmth and for the calibration
    assert result.seconds == {"a": [1.0] * rounds, "b": [1.0] * rounds}
    assert result.peak() == pytest.approx(100.0)


def test_lower_quartile_is_between_the_fastest_sample_and_the_median():
    assert lower_quartile([7.0]) == 7.0
    assert lower_quartile([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert Comparison({"x": [1.0, 2.0, 3.0, 4.0, 5.0]}).lower_quartile("x") == 2.0


def test_a_wrong_result_is_not_timed():
    right = torch.zeros(2, dtype=torch.float64)
    assert check_close("case", right.float(), right, 0.0) == 0.0
    for wrong in (torch.tensor([0.0, 0.1]), torch.tensor([0.0, float("nan")]), torch.zeros(3)):
        with pytest.raises(BenchmarkError, match="case"):
            check_close("case", wrong, right, 0.01)


def test_the_default_allocator_is_free_of_the_no_fault_settings(monkeypatch):
    for name, value in NO_FAULT_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    assert NO_FAULT_ALLOCATOR.keys().isdisjoint(allocator_environment("default"))
    assert allocator_environment("nofault").items() >= NO_FAULT_ALLOCATOR.items()


def test_tables_align_numbers_to_the_right():
    columns = [Column("name", lambda row: row["name"]), Column("ms", lambda row: row["ms"], ".1f")]
    rows = [{"name": "a", "ms": 1.25}, {"name": "bcd", "ms": 100.0}]
    assert plain(columns, rows).splitlines() == ["name     ms", "-----------", "a       1.2", "bcd   100.0"]
    assert markdown(columns, rows).splitlines()[1] == "|---|---:|"


def test_the_memory_of_networks_stands_in_the_readme(monkeypatch, tmp_path):
    def measured(network: str, backend: str, batch: int, extent: int, allocator: str) -> dict:
        sizes = {"saved_mb": 3.0, "peak_mb": 4.0}
        return {"network": network, "backend": backend, "batch_size": batch, "extent": extent, **sizes}

    monkeypatch.setattr(memory, "NETWORKS", {"small": None})
    monkeypatch.setattr(memory, "_in_own_process", measured)
    memory.measure(tmp_path, batch=2, extent=32)
    (tmp_path / "README.md").write_text(README)
    report.write(tmp_path, tmp_path / "README.md")
    lines = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| small, batch 2")]
    assert [line.split(" | ")[1] for line in lines] == list(memory.CONTENDERS)
