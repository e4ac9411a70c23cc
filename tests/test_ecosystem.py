"""What PyTorch has around a layer: torch.fx, fusion with batch normalisation, hooks, checkpointing, profiles, data
parallel and sharded training.
"""

import copy
import pickle

import pytest
import torch
import torch.distributed
import torch.distributed.device_mesh
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import cnn_ext
import cnn_ext.functional as C

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))


def images():
    return torch.randn(2, 1, 8, 8)


def gradients(net, call, input):
    net.zero_grad()
    call(input).square().sum().backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def assert_close(got, wanted, terms=100):
    tolerance = torch.finfo(wanted.dtype).eps * terms * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def test_fx_records_the_functions_of_a_converted_model():
    net, input = cnn_ext.convert(model()).eval(), images()
    traced = fx.symbolic_trace(net)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {C.conv2d, C.max_pool2d, C.avg_pool2d} <= called
    assert torch.equal(traced(input), net(input))
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(twin(input), net(input))
    assert all(map(torch.equal, gradients(net, traced, input), gradients(net, net, input)))


def test_fx_records_the_layers_as_leaves_where_a_tracer_says_so():
    class LeafTracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)

    graph = LeafTracer().trace(cnn_ext.convert(model()))
    assert [node.target for node in graph.nodes if node.op == "call_module"][:2] == ["0", "1"]


def test_fuse_conv_bn_eval():
    net = cnn_ext.convert(model()).eval()
    net[1].running_mean.uniform_(), net[1].running_var.uniform_(0.5, 2)
    fused = fuse_conv_bn_eval(net[0], net[1])
    assert type(fused) is cnn_ext.Conv2d
    input = images()
    assert_close(fused(input), net[1](net[0](input)))


def test_hooks_see_what_torchs_layers_show():
    def record(net, seen):
        layer = net[0]
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(("pre", inputs[0].shape)))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(("forward", output.shape)))
        layer.register_full_backward_pre_hook(lambda module, grads: seen.append(("backward pre", grads[0].shape)))
        layer.register_full_backward_hook(
            lambda module, of_inputs, of_outputs: seen.append(("backward", of_inputs[0].shape, of_outputs[0].shape))
        )
        layer.weight.register_hook(lambda grad: seen.append(("weight", grad.shape)))
        net(images().requires_grad_()).sum().backward()
        return seen

    assert record(cnn_ext.convert(model()), []) == record(model(), [])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    net = cnn_ext.convert(model()[2:], fuse=True)
    head = cnn_ext.Conv2d(1, 4, 3, padding=1)
    input = images().requires_grad_()

    def recomputed(input):
        return net(checkpoint(head, input, use_reentrant=use_reentrant))

    whole = nn.Sequential(head, net)
    assert all(map(torch.equal, gradients(whole, recomputed, input), gradients(whole, whole, input)))


def test_a_profile_names_forward_and_backward():
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.AvgPool2d(2))
    with torch.profiler.profile() as profile:
        cnn_ext.convert(layers)(images().requires_grad_()).sum().backward()
    names = {event.name for event in profile.events()}
    conv = {f"cnn_ext::conv2d_{way}" for way in ("forward", "backward_input", "backward_weight", "backward_bias")}
    assert (
        conv | {f"cnn_ext::{pool}_pool2d_{way}" for pool in ("max", "avg") for way in ("forward", "backward")} <= names
    )


def test_state_dicts_go_both_ways():
    ours, theirs = cnn_ext.convert(model(), fuse=True), model()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for net, other in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            net[0].weight.add_(1)
        other.load_state_dict(net.state_dict())
        assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_a_tensor_that_outlived_its_transform():
    kept = []
    weight = torch.randn(1, 1, 3, 3)
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(images())
    assert torch.equal(C.conv2d(kept[0], weight), C.conv2d(kept[0].clone(), weight))
    with pytest.raises(RuntimeError, match="channels"):
        C.conv2d(kept[0], torch.randn(1, 2, 3, 3))


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


@needs_gloo
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings("error:Grad strides do not match bucket view strides")
def test_distributed_data_parallel(process_group, format):
    net, input = cnn_ext.convert(model(), fuse=True).to(memory_format=format), images()
    wanted = gradients(net, net, input)
    assert all(map(torch.equal, gradients(net, DistributedDataParallel(net), input), wanted))


@needs_gloo
def test_fully_sharded_data_parallel(process_group):
    net, input = cnn_ext.convert(model()), images()
    wanted = gradients(net, net, input)
    for layer in (net[0], net):
        fully_shard(layer, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    got = gradients(net, net, input)
    assert all(torch.equal(grad.full_tensor(), other) for grad, other in zip(got, wanted, strict=True))


def test_weights_are_read_at_every_call():
    """Nothing is kept of a weight: writes that torch does not count are seen."""
    layer, input = cnn_ext.Conv2d(1, 2, 3), images()
    with torch.inference_mode():
        before = layer(input)
        layer.weight.data.mul_(2)
        layer.weight.detach().numpy()[:] += 1
        after = layer(input)
    assert not torch.equal(before, after)
    assert_close(after, F.conv2d(input, layer.weight, layer.bias).detach())
