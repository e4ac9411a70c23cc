"""The two pictures of a run, as PNG files in memory."""

import io

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cnn_ext.mnist.data import Images
from cnn_ext.mnist.train import History

SHOWN = 12
WRONG = "tab:red"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def curves(history: History, title: str) -> bytes:
    """The lecture's four curves: loss on the left, accuracy on the right."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(title)
    panels = {
        "Loss": ((history.train_loss, "Train loss"), (history.validation_loss, "Validation loss")),
        "Accuracy": ((history.train_accuracy, "Train acc."), (history.validation_accuracy, "Validation acc.")),
    }
    for axes, (label, series) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (values, name), style in zip(series, ("-o", "--<"), strict=True):
            axes.plot(range(1, len(values) + 1), values, style, label=name)
        axes.set_xlabel("Epoch", size=15)
        axes.set_ylabel(label, size=15)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=15)
    return _png(figure)


def predictions(data: Images, probabilities: torch.Tensor, title: str) -> bytes:
    """The digits of ``data`` with the class predicted, its probability, and the true class where it is another."""
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    figure.suptitle(title)
    confidences, classes = probabilities.max(dim=1)
    grid = figure.subplots(2, SHOWN // 2).flat
    rows = zip(grid, data.images, data.labels.tolist(), classes.tolist(), confidences.tolist(), strict=True)
    for axes, image, label, predicted, confidence in rows:
        axes.imshow(image[0].cpu().numpy(), cmap="gray_r", vmin=0, vmax=255)
        right = predicted == label
        text = f"{predicted}  ({confidence:.0%})" if right else f"{predicted}  ({confidence:.0%}), is {label}"
        axes.set_title(text, color="black" if right else WRONG, size=12)
        axes.set_xticks([])
        axes.set_yticks([])
    return _png(figure)
