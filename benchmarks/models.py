"""Every classification and segmentation model of torchvision, and timm's CNN families, converted: do logits and
parameter gradients equal the original's?

Random weights (also where a model starts with zeros, as the head of a vision transformer or the last normalisation of
a residual block does: they hide what stands before them), evaluation mode (batch statistics and dropout would), with
running variances that keep the signal's size (those of a new model let it vanish over many layers), float64, where
rounding is far below what a wrong value would show and turns no ReLU's input from one sign to the other. A result may
be off by

    eps * 2 * layers * sqrt(terms)    relative to the largest of the logits, or of the gradients of its layer,

``layers`` (there and back) being the layers with weights and ``terms`` the largest sum that one of them adds up: a
layer adds errors of eps * sqrt(terms), and the layers after it carry them on. (Of its layer, not its own: the gradient
of a bias that a normalisation takes out again is nothing but rounding.)
"""

import functools
import gc
import importlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import cnn_ext
from benchmarks import machine
from benchmarks.harness import BenchmarkError
from benchmarks.tables import Column, markdown, plain

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BATCH, CLASSES = 2, 10
LIBRARIES = ("torchvision", "timm")

# One or two of each CNN family of timm, the small variants.
TIMM = (Path(__file__).parent / "timm_models.txt").read_text().split()


@dataclass
class Row:
    """One architecture."""

    library: str
    name: str
    converted: int  # layers that compute with this package
    functional: bool  # whether its forward calls torch.nn.functional, so that convert(functional=True) is needed
    dtype: str
    layers: int
    logits_error: float  # of the worst logit, relative to the largest
    gradient_error: float  # of the worst element, relative to the largest of its layer
    tolerance: float
    seconds: float

    @property
    def equal(self) -> bool:
        return max(self.logits_error, self.gradient_error) <= self.tolerance


def measure(results: Path, pattern: str, resume: bool) -> int:
    """Writes ``results``/models_cpu.json and docs/models.md after every architecture; 1 where a model differs.

    With ``resume`` what the file has already stays there and is not measured again.
    """
    path = results / "models_cpu.json"
    document = machine.describe("cpu") | {"command": _command(pattern, resume)}
    rows = {(row["library"], row["name"]): row for row in _recorded(path)} if resume else {}
    for library, name, build, size in _architectures(re.compile(pattern).search):
        if (library, name) in rows:
            continue
        row = _compare(library, name, build, size)
        _progress(row)
        recorded = {"date": document["date"], "source_hash": document["versions"]["source_hash"]}
        rows[library, name] = asdict(row) | {"equal": row.equal} | recorded
        document["rows"] = sorted(rows.values(), key=lambda row: (LIBRARIES.index(row["library"]), row["name"]))
        path.write_text(json.dumps(document, indent=1) + "\n")
        DOCUMENT.write_text(page(document))
    if "rows" not in document:
        raise BenchmarkError("models: neither torchvision nor timm has a (further) model of that name, or is here")
    print(plain(COLUMNS, document["rows"]))
    print(f"wrote {path}\nwrote {DOCUMENT}")
    return int(not all(row["equal"] for row in document["rows"]))


def _command(pattern: str, resume: bool) -> str:
    options = [*(["--only", pattern] if pattern else []), *(["--resume"] if resume else [])]
    return shlex.join(["python", "-m", "benchmarks", "models", *options])


def _recorded(path: Path) -> list[dict]:
    """The rows of an earlier run, with the date and the sources that they were measured with."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    recorded = {"date": document["date"], "source_hash": document["versions"]["source_hash"]}
    return [recorded | row for row in document["rows"]]


def _progress(row: Row) -> None:
    verdict = "equal" if row.equal else "DIFFERS"
    print(f"models: {row.library} {row.name}: {verdict}, {row.seconds:.1f} s", file=sys.stderr, flush=True)


def _architectures(only: Callable[[str], object]) -> Iterator[tuple[str, str, Callable[[], nn.Module], int]]:
    """(library, name, what builds it, height and width of its input)"""
    torchvision = _imported("torchvision")
    if torchvision is not None:
        for module in (torchvision.models, torchvision.models.segmentation):
            for name in filter(only, torchvision.models.list_models(module=module)):
                yield "torchvision", name, _torchvision_builder(torchvision, name), _size(name)
    timm = _imported("timm")
    if timm is not None:
        for name in filter(only, TIMM):
            yield "timm", name, lambda name=name: timm.create_model(name, num_classes=CLASSES), _size(name)


def _imported(library: str):
    try:
        return importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises the latter
        print(f"models: {library} is left out: {error}", file=sys.stderr)
        return None


def _size(name: str) -> int:
    """Small, but for those that need more for their last feature map."""
    if name.startswith(("botnet", "focalnet", "maxvit", "vit_")):
        return 256 if name.startswith("botnet") else 224
    return 128 if "inception" in name or "nception" in name or name in ("alexnet", "legacy_xception") else 64


def _torchvision_builder(torchvision, name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        more = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name in torchvision.models.list_models(module=torchvision.models.segmentation):
            more = {"weights_backbone": None}
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **more)

    return build


def _compare(library: str, name: str, build: Callable[[], nn.Module], size: int) -> Row:
    started = time.perf_counter()
    torch.manual_seed(1)
    model = _without_zeros(build().eval())
    model = model.double()
    images = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    _set_scales(model, images)
    wanted = {}
    wanted_logits = _run(model, images, wanted.__setitem__)
    functional = _calls_functions(model)
    converted = cnn_ext.convert(model, functional=functional)
    comparison = Comparison(wanted)
    logits = _run(converted, images, comparison.add)
    layers, terms = _depth(converted)
    row = Row(
        library=library,
        name=name,
        converted=sum(layer.converted for layer in cnn_ext.conversion_report(converted)),
        functional=functional,
        dtype="float64",
        layers=layers,
        logits_error=((logits - wanted_logits).abs().max() / wanted_logits.abs().max()).item(),
        gradient_error=comparison.error(),
        tolerance=torch.finfo(torch.float64).eps * 2 * layers * math.sqrt(terms),
        seconds=time.perf_counter() - started,
    )
    gc.collect()
    return row


def _without_zeros(model: nn.Module) -> nn.Module:
    """With random values in weights that start as zeros or next to them: they would hide the rest."""
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.02)
    return model


def _set_scales(model: nn.Module, images: torch.Tensor) -> None:
    """Gives the batch normalisations the mean square of what the images bring them as variance.

    One for all channels, and the means stay 0: taking out what values share, or scaling a channel up whose sums cancel,
    would let rounding grow from layer to layer.
    """

    def measure(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.running_var.fill_(inputs[0].square().mean())

    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()


def _run(model: nn.Module, images: torch.Tensor, take: Callable[[str, torch.Tensor], None]) -> torch.Tensor:
    """The logits; ``take`` gets the gradient of each parameter as soon as there is one."""

    def hand_over(name: str, parameter: nn.Parameter) -> None:
        take(name, parameter.grad)
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(functools.partial(hand_over, name))
        for name, parameter in model.named_parameters()
    ]
    output = model(images)
    logits = output["out"] if isinstance(output, dict) else output
    logits.square().mean().backward()
    for handle in handles:
        handle.remove()
    return logits.detach()


class Comparison:
    """The gradients of a second run beside those of the first, which it takes as they come: for the memory of the
    largest models, neither are kept."""

    def __init__(self, wanted: dict[str, torch.Tensor]):
        self._wanted = wanted
        self._errors: dict[str, float] = {}  # the worst of each layer
        self._largest: dict[str, float] = {}  # gradient of each layer

    def add(self, name: str, gradient: torch.Tensor) -> None:
        wanted = self._wanted.pop(name)
        layer = name.rpartition(".")[0]
        for worst, values in ((self._errors, gradient - wanted), (self._largest, wanted)):
            worst[layer] = max(worst.get(layer, 0.0), values.abs().max().item())

    def error(self) -> float:
        """The worst error of a layer, relative to its largest gradient."""
        if self._wanted:
            raise BenchmarkError(f"models: no gradient came for {', '.join(self._wanted)}")
        relative = (error / self._largest[layer] for layer, error in self._errors.items() if error)
        return max(relative, default=0.0)


def _depth(model: nn.Module) -> tuple[int, int]:
    """Layers with weights, and the terms of the largest sum of one of them."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return len(weights), max(p[0].numel() for p in weights)


_CALLED = ("conv1d", "conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")


def _calls_functions(model: nn.Module) -> bool:
    """Whether a forward of the model's own classes mentions a function of this package."""
    names = set()
    for module in model.modules():
        if not type(module).__module__.startswith("torch.nn."):
            for method in ("forward", "_forward"):
                code = getattr(getattr(type(module), method, None), "__code__", None)
                names |= set(code.co_names) if code else set()
    return bool(names & set(_CALLED))


COLUMNS = [
    Column("library", lambda row: row["library"]),
    Column("architecture", lambda row: f"`{row['name']}`"),
    Column("layers converted", lambda row: row["converted"], "d"),
    Column("`functional=True`", lambda row: "yes" if row["functional"] else ""),
    Column("dtype", lambda row: row["dtype"]),
    Column("error of logits", lambda row: row["logits_error"], ".1e"),
    Column("of gradients", lambda row: row["gradient_error"], ".1e"),
    Column("allowed", lambda row: row["tolerance"], ".1e"),
    Column("", lambda row: "equal" if row["equal"] else "**differs**"),
]


def page(document: dict) -> str:
    """docs/models.md"""
    rows, versions = document["rows"], document["versions"]
    return (
        "# Converted models\n\n"
        f"Written by `{document['command']}` on {document['date'][:10]}, torch {versions['torch']}: "
        f"{sum(row['equal'] for row in rows)} of {len(rows)} architectures give the original's logits and parameter "
        "gradients.\n\nRandom weights, evaluation mode, small images. Errors are relative to the largest "
        "logit, or the largest gradient of the layer; allowed is eps * 2 * layers * sqrt(terms of the largest sum).\n\n"
        f"{markdown(COLUMNS, rows)}\n"
    )
