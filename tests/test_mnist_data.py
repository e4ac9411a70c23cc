"""Data: every place and form in which MNIST is found, every way a file can be wrong, and what stands in offline."""

import dataclasses
import gzip
import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch

from cnn_ext.mnist import data, digits, download, files, idx
from cnn_ext.mnist.errors import InputError

MNIST = Path(__file__).parent.parent.parent / "shared" / "data"
COUNTS = {"train_images": (12, 28, 28), "train_labels": (12,), "test_images": (5, 28, 28), "test_labels": (5,)}


def idx_bytes(tensor: torch.Tensor) -> bytes:
    return (
        bytes([0, 0, 8, tensor.dim()])
        + struct.pack(f">{tensor.dim()}I", *tensor.shape)
        + bytes(tensor.flatten().tolist())
    )


@pytest.fixture
def contents(monkeypatch) -> dict[str, bytes]:
    """Four small files in MNIST's form, whose sums stand in for the real ones; 4 images for validation; no network."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for key, shape in COUNTS.items():
        made[key] = idx_bytes(torch.randint(0, 10, shape, dtype=torch.uint8, generator=generator))
        sums = {
            "md5": hashlib.md5(made[key]).hexdigest(),
            "gz_md5": hashlib.md5(gzip.compress(made[key], mtime=0)).hexdigest(),
        }
        monkeypatch.setitem(files.FILES, key, dataclasses.replace(files.FILES[key], **sums))
    monkeypatch.setattr(data, "VALIDATION_IMAGES", 4)
    monkeypatch.setattr(download, "_stream", lambda url, chunks: chunks.put(OSError("no network in tests")))
    monkeypatch.delenv("CNN_EXT_DATA", raising=False)
    return made


def put(folder: Path, contents: dict[str, bytes], compressed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in contents.items():
        name = files.FILES[key].name
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("layout", [".", "MNIST/raw", "raw"])
def test_mnist_is_found(tmp_path, contents, layout, compressed):
    put(tmp_path / layout, contents, compressed)
    loaded = data.load("mnist", tmp_path, pytest.fail)
    assert (loaded.name, len(loaded.validation), len(loaded.train), len(loaded.test)) == ("mnist", 4, 8, 5)
    assert bytes(loaded.validation.images.flatten().tolist()) == contents["train_images"][16:][: 4 * 784]
    assert bytes(loaded.train.labels.tolist()) == contents["train_labels"][8 + 4 :]
    assert loaded.train.images.shape == (8, 1, 28, 28)


def test_environment_and_working_directory_are_searched(tmp_path, contents, monkeypatch):
    put(tmp_path / "elsewhere", contents)
    monkeypatch.setenv("CNN_EXT_DATA", str(tmp_path / "elsewhere"))
    assert data.load("auto", tmp_path / "empty", pytest.fail).source == str(tmp_path / "elsewhere")
    monkeypatch.delenv("CNN_EXT_DATA")
    put(tmp_path / "here" / "data", contents)
    monkeypatch.chdir(tmp_path / "here")
    assert data.load("auto", None, pytest.fail).source == "data"


def truncated(content):
    return content[:-1]


def too_long(content):
    return content + b"\0"


def wrong_magic(content):
    return b"\x00\x00\x0d" + content[3:]


def corrupted(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def headless(content):
    return content[:7]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncated, "truncated"),
        (too_long, "too long"),
        (wrong_magic, "not the IDX file expected"),
        (corrupted, "corrupted: the MD5 sum"),
        (headless, "truncated"),
    ],
)
@pytest.mark.parametrize("key", COUNTS)
def test_damaged_file_is_named(tmp_path, contents, damage, complaint, key):
    put(tmp_path, contents | {key: damage(contents[key])})
    with pytest.raises(InputError, match=complaint) as error:
        data.load("auto", tmp_path, pytest.fail)
    assert str(tmp_path / files.FILES[key].name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda gz: gz[:-9], lambda gz: gz[:40] + b"xxxx" + gz[44:], lambda gz: b"plain text"]
)
def test_damaged_gzip_is_named(tmp_path, contents, damage):
    put(tmp_path, contents, compressed=True)
    path = tmp_path / f"{files.FILES['train_images'].name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="cannot be read") as error:
        data.load("mnist", tmp_path, pytest.fail)
    assert str(path) in str(error.value)


def test_sizes_in_the_header_cannot_overflow(tmp_path):
    with pytest.raises(InputError, match="truncated"):
        idx.parse(bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"pixels", tmp_path, axes=3)


class Mirrors:
    """Two mirrors in memory: what each serves for a file, or an exception."""

    def __init__(self, contents):
        self.good = {f"{files.FILES[key].name}.gz": gzip.compress(made, mtime=0) for key, made in contents.items()}
        self.asked = []

    def stream(self, url, chunks):
        self.asked.append(url)
        content = self.good[url.rpartition("/")[2]]
        for start in range(0, len(content), 100):
            chunks.put(content[start : start + 100])
        chunks.put(None)


def test_download_is_verified_and_put_in_place(tmp_path, contents, monkeypatch):
    mirrors = Mirrors(contents)
    monkeypatch.setattr(download, "_stream", mirrors.stream)
    loaded = data.load("mnist", tmp_path, pytest.fail)
    assert loaded.source == str(tmp_path / "MNIST" / "raw")
    assert sorted(os.listdir(loaded.source)) == sorted(mirrors.good)
    data.load("mnist", tmp_path, pytest.fail)
    assert len(mirrors.asked) == 4


def test_second_mirror_serves_when_the_first_serves_rubbish(tmp_path, contents, monkeypatch):
    mirrors = Mirrors(contents)

    def stream(url, chunks):
        if url.startswith(download.MIRRORS[0]):
            chunks.put(b"<html>not found</html>")
            chunks.put(None)
        else:
            mirrors.stream(url, chunks)

    monkeypatch.setattr(download, "_stream", stream)
    assert data.load("mnist", tmp_path, pytest.fail).name == "mnist"
    assert all(url.startswith(download.MIRRORS[1]) for url in mirrors.asked)


def test_silence_ends_the_download(tmp_path, contents, monkeypatch):
    monkeypatch.setattr(download, "_stream", lambda url, chunks: None)
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    with pytest.raises(InputError, match="no answer in time"):
        data.load("mnist", tmp_path, pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_offline_auto_warns_once_and_gives_digits(tmp_path, contents):
    warnings = []
    loaded = data.load("auto", tmp_path, warnings.append)
    assert loaded.name == "digits"
    assert len(warnings) == 1
    assert "MNIST" in warnings[0] and str(tmp_path) in warnings[0] and "\n" not in warnings[0]


def test_offline_mnist_insists(tmp_path, contents):
    with pytest.raises(InputError, match="cannot be downloaded"):
        data.load("mnist", tmp_path, pytest.fail)


def test_digits():
    loaded = data.load_digits()
    assert [len(part) for part in (loaded.validation, loaded.train, loaded.test)] == [140, 1297, 360]
    images, labels = loaded.train.batch(torch.tensor([5, 3]))
    assert images.shape == (2, 1, 28, 28) and images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.tolist() == [loaded.train.labels[5], loaded.train.labels[3]]
    assert sorted(loaded.test.labels.unique().tolist()) == list(range(10))


def test_another_table_is_not_digits(tmp_path):
    path = tmp_path / "digits.csv.gz"
    for text, complaint in (("1,2,3\n", "not the table"), ("a,b\n", "not the table")):
        path.write_bytes(gzip.compress(text.encode()))
        with pytest.raises(InputError, match=complaint):
            digits.read(path)


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not at ../shared/data")
def test_real_mnist():
    loaded = data.load("mnist", MNIST, pytest.fail)
    assert [len(part) for part in (loaded.validation, loaded.train, loaded.test)] == [10_000, 50_000, 10_000]
    assert loaded.validation.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert loaded.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not at ../shared/data")
def test_own_reader_gives_what_torchvision_gives():
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    theirs = torchvision.datasets.MNIST(MNIST, train=False)
    ours = data.load("mnist", MNIST, pytest.fail).test
    assert torch.equal(ours.images.squeeze(1), theirs.data) and torch.equal(ours.labels, theirs.targets)
