"""On a GPU: an image has the same bits whatever the batch, even where the batch decides who adds up what."""

import pytest
import torch
import torch.nn.functional as F

import cnn_ext.functional as C

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda")

# name: (size of the images, size of the weight): a depth that is summed up in parts, by several blocks where the batch
# is small and by one where it is large; and a patch that is fetched for all taps.
LARGE_BATCHES = {
    "parts of the depth": ((400, 256, 8, 8), (64, 256, 3, 3)),
    "one patch for all taps": ((70, 24, 31, 31), (64, 24, 3, 3)),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE_BATCHES)
def test_bits_of_tensor_cores_do_not_depend_on_the_batch(name, dtype, memory_format, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    images, weight = (
        torch.randn(size, device=CUDA).to(dtype, memory_format=memory_format).requires_grad_()
        for size in LARGE_BATCHES[name]
    )

    def run(tensor: torch.Tensor, function=C.conv2d) -> tuple[torch.Tensor, torch.Tensor]:
        output = function(tensor, weight.to(tensor.dtype), padding=1)
        return output.detach(), torch.autograd.grad(output.sum(), tensor)[0]

    whole = run(images)
    part = images[:3].detach().requires_grad_()
    for got, expected in zip(run(part), whole, strict=True):
        assert torch.equal(got, expected[:3])
    for got, expected in zip(whole, run(images.detach().double().requires_grad_(), F.conv2d), strict=True):
        terms = weight[0].numel()
        tolerance = terms**0.5 * 16 * 2.0**-9 + expected.abs() * torch.finfo(dtype).eps  # operands of a few units
        assert ((got.double() - expected).abs() <= tolerance).all()
