"""docs/compatibility.md, line by line."""

import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cnn_ext
import cnn_ext.functional as C

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"),
]

TABLE = re.findall(
    r"^\| (?!given)([^|]+?) \| (\w+) \| [^|]+ \|$",
    (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text(),
    re.MULTILINE,
)
FUNCTIONS = {
    "conv2d": lambda x: C.conv2d(x, torch.ones(1, 1, 2, 2, dtype=x.dtype, device=x.device)),
    "conv_transpose2d": lambda x: C.conv_transpose2d(x, torch.ones(1, 1, 2, 2, dtype=x.dtype, device=x.device)),
    "max_pool2d": lambda x: C.max_pool2d(x, 2),
    "avg_pool2d": lambda x: C.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: C.adaptive_avg_pool2d(x, 2),
}
LAYERS = {
    "conv2d": lambda: cnn_ext.Conv2d(1, 1, 2),
    "conv_transpose2d": lambda: cnn_ext.ConvTranspose2d(1, 1, 2),
    "max_pool2d": lambda: cnn_ext.MaxPool2d(2),
    "avg_pool2d": lambda: cnn_ext.AvgPool2d(2),
    "adaptive_avg_pool2d": lambda: cnn_ext.AdaptiveAvgPool2d(2),
}
IMAGES = torch.arange(16.0).reshape(1, 1, 4, 4)


def on_fake_device(device, name):
    with FakeTensorMode():
        return FUNCTIONS[name](torch.empty(1, 1, 4, 4, device=device))


def half_precisions(name):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert FUNCTIONS[name](IMAGES.to(dtype)).dtype == dtype


def trace(name):
    layer = LAYERS[name]()
    traced = torch.jit.trace(layer, IMAGES)
    images = [torch.randn(IMAGES.shape).requires_grad_()]
    images.append(images[0].detach().clone().requires_grad_())
    outputs = traced(images[0]), layer(images[1])
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(images[0].grad, images[1].grad)


def scripted(name):
    model = torch.jit.script(nn.Sequential(getattr(nn, type(LAYERS[name]()).__name__)(*_ARGUMENTS.get(name, (2,)))))
    types = [type(module) for module in model.modules()]
    assert [type(module) for module in cnn_ext.convert(model).modules()] == types


_ARGUMENTS = {"conv2d": (1, 1, 2), "conv_transpose2d": (1, 1, 2)}


def without_memory(name):
    images = IMAGES.clone()
    images.untyped_storage().resize_(0)
    FUNCTIONS[name](images)


def numpy_array(name):
    function = getattr(C, name)
    function(IMAGES.numpy(), IMAGES if "conv" in name else 2)


CASES = {
    "float32, float64, float16, bfloat16": half_precisions,
    **{
        name: lambda op, name=name: FUNCTIONS[op](IMAGES.to(getattr(torch, name)))
        for name in ("complex64", "int64", "uint8", "bool", "float8_e4m3fn")
    },
    "a meta tensor": lambda name: FUNCTIONS[name](IMAGES.to("meta")),
    "a fake CUDA tensor": lambda name: on_fake_device("cuda", name),
    "an MPS tensor": lambda name: on_fake_device("mps", name),
    "an XPU tensor": lambda name: on_fake_device("xpu", name),
    "a sparse tensor": lambda name: FUNCTIONS[name](IMAGES.to_sparse()),
    "an MKL-DNN tensor": lambda name: FUNCTIONS[name](IMAGES.to_mkldnn()),
    "a nested tensor": lambda name: FUNCTIONS[name](torch.nested.nested_tensor([IMAGES[0], IMAGES[0]])),
    "a tensor that torch has yet to negate": lambda name: FUNCTIONS[name](torch._neg_view(IMAGES)),
    "zeros without memory": lambda name: FUNCTIONS[name](torch._efficientzerotensor(IMAGES.shape)),
    "a tensor whose storage was resized to 0": without_memory,
    "a NumPy array": numpy_array,
    "torch.jit.script": lambda name: torch.jit.script(LAYERS[name]()),
    "torch.jit.trace": trace,
    "torch.jit.save of a trace": lambda name: torch.jit.save(torch.jit.trace(LAYERS[name](), IMAGES), io.BytesIO()),
    "convert of a scripted model": scripted,
}


def test_the_table_has_every_case():
    assert [given for given, _ in TABLE] == list(CASES)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("given", "happens"), TABLE, ids=lambda text: text.replace(" ", "_"))
def test_what_happens(given, happens, name):
    if happens == "works":
        CASES[given](name)
        return
    exceptions = {error.__name__: error for error in (NotImplementedError, RuntimeError, TypeError)}
    words = "not for torch.jit.script" if given == "torch.jit.script" else None
    with pytest.raises(exceptions[happens], match=words):
        CASES[given](name)
