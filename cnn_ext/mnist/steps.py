"""One step of training: a batch forward, its loss, the gradients, the optimiser.

On a GPU a step is some fifty launches, and to make them takes the processor longer than to run them takes the GPU:
there a step is captured in a CUDA graph, and a batch costs one launch.
"""

from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

from cnn_ext.mnist.data import Images
from cnn_ext.mnist.tally import Tally

WARM_UP = 3  # batches in which libraries choose, load and allocate, and torch.compile compiles


class Step:
    """Trains ``model`` on a batch of ``data`` and adds it to ``tally``; compiled: by torch.compile."""

    def __init__(self, model: nn.Module, optimizer, data: Images, tally: Tally, *, compiled: bool = False):
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer = optimizer
        self.data = data
        self.tally = tally

    def __call__(self, indices: torch.Tensor) -> None:
        images, labels = self.data.batch(indices)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tally.add(loss, logits, labels)


class CapturedStep:
    """The same step, replayed from a CUDA graph: one for each size of a batch.

    The first batches of a size run as they come; the next one is captured, with the indices of its images in a tensor
    that later batches overwrite. The optimiser has to be capturable.
    """

    def __init__(self, step: Step):
        self.step = step
        self._stream = torch.cuda.Stream()
        self._seen = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __call__(self, indices: torch.Tensor) -> None:
        size = len(indices)
        if size in self._graphs:
            graph, captured_indices = self._graphs[size]
            captured_indices.copy_(indices)
            graph.replay()
            self.step.tally.images += size
        elif self._seen[size] < WARM_UP:
            self._seen[size] += 1
            self._run_beside(indices)
        else:
            self._graphs[size] = self._capture(indices.clone())
            self._graphs[size][0].replay()

    def _run_beside(self, indices: torch.Tensor) -> None:
        """On the stream that captures, for what libraries keep for each stream."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self.step(indices)
        here.wait_stream(self._stream)

    def _capture(self, indices: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph and the tensor that it reads. The images are counted here; nothing else happens yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self.step(indices)
        return graph, indices
