"""torch.onnx.export: plain nodes, which ONNX's reference implementation and onnxruntime run to the same numbers."""

import pytest
import torch
from torch import nn

import cnn_ext
import cnn_ext.functional as C
from cnn_ext import ops

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

TRANSPOSED = (2, 1), (1, 0, 1, 1), (1, 2), 1  # stride, padding, dilation, groups

# Functions of input [N, 2, 9, 10], weight [4, 2, 3, 3] and bias [4], and the nodes that they become.
FUNCTIONS = [
    (lambda x, w, b: C.conv2d(x, w, b, stride=2, padding=((1, 0), (2, 1))), ["Conv"]),
    (lambda x, w, b: C.conv2d(x, w, dilation=2, padding="full"), ["Conv"]),
    (lambda x, w, b: C.conv2d(x, w[:, :1], padding="same", groups=2), ["Conv"]),
    (lambda x, w, b: C.conv2d(x, w, b, stride=3, padding="same_lower", activation="relu"), ["Conv", "Relu"]),
    (lambda x, w, b: C.conv2d_relu_max_pool2d(x, w, b, pool_size=3, pool_stride=2), ["Conv", "Relu", "MaxPool"]),
    (
        lambda x, w, b: ops.conv2d_backward_input(x, w.transpose(0, 1), (x.shape[0], 4, 19, 12), *TRANSPOSED),
        ["ConvTranspose"],
    ),
    (lambda x, w, b: C.max_pool2d(x, 3, 2, 1, ceil_mode=True), ["MaxPool"]),
    (lambda x, w, b: C.max_pool2d(x, 2, 3, "same", dilation=2), ["MaxPool"]),
    (lambda x, w, b: C.avg_pool2d(x, 3, 2, 1, ceil_mode=True), ["AveragePool"]),
    (lambda x, w, b: C.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), ["AveragePool"]),
    (lambda x, w, b: C.avg_pool2d(x, 3, 2, ((0, 1), (1, 0)), dilation=2), ["AveragePool"]),
    (lambda x, w, b: C.avg_pool2d(x, 3, 2, 1, divisor_override=-5), ["AveragePool", "Mul"]),
]


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, input):
        return [function(input, self.weight, self.bias) for function, _ in FUNCTIONS]


def export(model, images, batch_is_dynamic=False):
    shapes = ({0: torch.export.Dim.DYNAMIC},) if batch_is_dynamic else None
    return torch.onnx.export(model, (images,), dynamic_shapes=shapes, verbose=False).model_proto


def computing_nodes(graph):
    """What is left without the views of weights that the functions above take."""
    return [node.op_type for node in graph.node if node.op_type not in ("Transpose", "Slice", "Constant", "Concat")]


def runs(proto, images):
    """The outputs of onnxruntime and of ONNX's reference implementation."""
    feed = {proto.graph.input[0].name: images.numpy()}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed), reference.ReferenceEvaluator(proto).run(None, feed)


def assert_close(got, wanted, terms):
    tolerance = torch.finfo(torch.float32).eps * terms * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(torch.from_numpy(got.copy()), wanted.detach(), rtol=0, atol=tolerance)


def test_every_function_becomes_plain_nodes_with_the_same_numbers():
    model, images = Everything().eval(), torch.randn(2, 2, 9, 10)
    proto = export(model, images)
    assert {node.domain for node in proto.graph.node} == {""}
    assert sorted(computing_nodes(proto.graph)) == sorted(name for _, names in FUNCTIONS for name in names)
    wanted = model(images)
    for outputs in runs(proto, images):
        for got, ours in zip(outputs, wanted, strict=True):
            assert_close(got, ours, terms=40)


def test_a_converted_cnn_with_any_batch():
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.AvgPool2d(3)
    model = cnn_ext.convert(nn.Sequential(*layers, nn.Flatten()), fuse=True).eval()
    proto = export(model, torch.randn(2, 1, 10, 10), batch_is_dynamic=True)
    images = torch.randn(5, 1, 10, 10)
    for (got,) in runs(proto, images):
        assert_close(got, model(images), terms=80)


class Indices(nn.Module):
    def forward(self, input):
        return C.max_pool2d(input, 2, return_indices=True)[1]


class DivisorAndCeil(nn.Module):
    def forward(self, input):
        return C.avg_pool2d(input, 2, ceil_mode=True, divisor_override=3)


@pytest.mark.parametrize(("model", "operator"), [(Indices(), "max_pool2d"), (DivisorAndCeil(), "avg_pool2d")])
def test_what_onnx_cannot_say_is_refused(model, operator):
    """The exporter names the operator: it tries other ways to trace the model before it gives up."""
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        export(model.eval(), torch.randn(1, 1, 5, 5))
    assert f"cnn_ext.{operator}_f" in str(caught.value.__cause__)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_older_exporter_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="dynamo=True"):
        torch.onnx.export(cnn_ext.MaxPool2d(2), (torch.randn(1, 1, 4, 4),), tmp_path / "model.onnx", dynamo=False)
