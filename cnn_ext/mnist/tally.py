"""Sums of loss and correct answers."""

import torch


class Tally:
    """Sums of loss and correct answers over the images seen, kept on the device."""

    def __init__(self, device: torch.device):
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.correct = torch.zeros((), device=device, dtype=torch.int64)
        self.images = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(dim=1) == labels).sum()
        self.images += len(labels)

    def reset(self) -> None:
        """Back to nothing, in the same tensors."""
        self.loss_sum.zero_()
        self.correct.zero_()
        self.images = 0

    def means(self) -> tuple[float, float]:
        """Loss and accuracy; waits for the device."""
        return self.loss_sum.item() / self.images, self.correct.item() / self.images
