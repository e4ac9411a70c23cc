"""Every convolution of some networks of torchvision, as shapes/networks.csv: layers that nobody chose.

shapes/conv2d.csv is a choice of characteristic layers. What is fast on those alone shows here.
"""

import csv
import importlib

import torch
from torch import nn

from benchmarks.cases import SHAPES

NETWORKS = (
    "alexnet", "convnext_tiny", "efficientnet_b0", "googlenet", "mobilenet_v2", "mobilenet_v3_large", "regnet_x_3_2gf",
    "regnet_y_800mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "vgg11_bn",
)  # fmt: skip
SIZE = 224
COLUMNS = ("C", "H", "W", "K", "kh", "kw", "stride", "pad", "dilation", "groups")

# As many samples as one call computes in about 10 ms.
BATCH, FLOPS = 16, 4e9


def write() -> None:
    """Writes shapes/networks.csv anew; each layer once, with the first network that has it."""
    models = importlib.import_module("torchvision").models
    layers: dict[tuple[int, ...], str] = {}
    for network in NETWORKS:
        for layer in _layers(models.get_model(network, weights=None)):
            layers.setdefault(layer, network)
    path = SHAPES / "networks.csv"
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("name", "class", "N", *COLUMNS, "source"))
        for layer, network in layers.items():
            values = dict(zip(COLUMNS, layer, strict=True))
            table.writerow((_name(network, values), _class(values), _batch(values), *layer, f"torchvision {network}"))
    print(f"wrote {path}: {len(layers)} layers")


def _layers(network: nn.Module) -> list[tuple[int, ...]]:
    """The values of COLUMNS of every square convolution, in the order in which they run."""
    found: list[tuple[int, ...]] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        if len({layer.kernel_size, layer.kernel_size[::-1]}) == 1:
            height_and_width = inputs[0].shape[2:]
            numbers = layer.kernel_size, layer.stride[:1], layer.padding[:1], layer.dilation[:1]
            found.append((layer.in_channels, *height_and_width, layer.out_channels, *sum(numbers, ()), layer.groups))

    network = network.to("meta").eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    network(torch.empty(1, 3, SIZE, SIZE, device="meta"))
    return found


def _name(network: str, v: dict[str, int]) -> str:
    stride = f"s{v['stride']}" if v["stride"] > 1 else ""
    groups = f"_g{v['groups']}" if v["groups"] > 1 else ""
    return f"{network}_{v['C']}x{v['H']}_{v['kh']}x{v['kw']}{stride}_{v['K']}{groups}"


def _class(v: dict[str, int]) -> str:
    """The classes of shapes/conv2d.csv, with strided ones and those on one pixel (squeeze-and-excitation) apart."""
    if v["C"] <= 4:
        return "small_cin"
    strided = "_strided" if v["stride"] > 1 else ""
    if v["groups"] == v["C"]:
        return f"depthwise{strided}"
    if v["groups"] > 1:
        return f"grouped{strided}"
    if v["H"] == v["W"] == 1:
        return "one_pixel"
    if v["kh"] == 1:
        return f"pointwise{strided}"
    return strided.removeprefix("_") or f"dense{v['kh']}x{v['kw']}"


def _batch(v: dict[str, int]) -> int:
    out = (v["H"] // v["stride"]) * (v["W"] // v["stride"])
    flops = 2 * v["K"] * out * v["C"] // v["groups"] * v["kh"] * v["kw"]
    return max(1, min(BATCH, int(FLOPS / flops)))
