"""The lecture's training script as it is printed, for comparison: torch's layers, Adam, a DataLoader of single images.

Where torchvision imports, its MNIST and ToTensor serve, as printed. Elsewhere ``ImageByImage`` stands in:
written after its description, it does the same work for each image: an array to a PIL image, and that to a float tensor
between 0 and 1. Added to the print: the clock, the command line and history.json; the loop runs one epoch.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset


class ImageByImage(Dataset):
    """MNIST image by image as torchvision gives it: fromarray, a copy of the bytes, [H, W, C] to [C, H, W], / 255."""

    def __init__(self, raw: Path) -> None:
        pixels = np.fromfile(raw / "train-images-idx3-ubyte", np.uint8, offset=16)
        labels = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8, offset=8)
        self.data = torch.from_numpy(pixels.reshape(-1, 28, 28))
        self.targets = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, target = self.data[index], int(self.targets[index])
        return to_tensor(Image.fromarray(image.numpy())), target


def to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True))
    pixels = pixels.view(picture.size[1], picture.size[0], 1).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255)


def training_images(data_dir: str) -> Dataset:
    try:
        import torchvision
        from torchvision import transforms
    except (ImportError, RuntimeError):
        return ImageByImage(Path(data_dir) / "MNIST" / "raw")
    transform = transforms.Compose([transforms.ToTensor()])
    return torchvision.datasets.MNIST(root=data_dir, train=True, transform=transform, download=False)


def build_model() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(in_channels=1, out_channels=32, kernel_size=5, padding=2))
    model.add_module("relu1", nn.ReLU())
    model.add_module("pool1", nn.MaxPool2d(kernel_size=2))
    model.add_module("conv2", nn.Conv2d(in_channels=32, out_channels=64, kernel_size=5, padding=2))
    model.add_module("relu2", nn.ReLU())
    model.add_module("pool2", nn.MaxPool2d(kernel_size=2))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc1", nn.Linear(3136, 1024))
    model.add_module("relu3", nn.ReLU())
    model.add_module("dropout", nn.Dropout(p=0.5))
    model.add_module("fc2", nn.Linear(1024, 10))
    return model


def train_epoch(model, train_dl, device) -> float:
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loss_sum, correct = 0.0, torch.zeros(())
    model.train()
    for x_batch, y_batch in train_dl:
        x_batch, y_batch = x_batch.to(device), y_batch.to(device)
        pred = model(x_batch)
        loss = loss_fn(pred, y_batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item() * y_batch.size(0)
        correct += (torch.argmax(pred, dim=1) == y_batch).float().sum().cpu()
    return float(correct / len(train_dl.dataset))


@torch.no_grad()
def validate(model, valid_dl, device) -> float:
    loss_fn = nn.CrossEntropyLoss()
    loss_sum, correct = 0.0, torch.zeros(())
    model.eval()
    for x_batch, y_batch in valid_dl:
        x_batch, y_batch = x_batch.to(device), y_batch.to(device)
        pred = model(x_batch)
        loss_sum += loss_fn(pred, y_batch).item() * y_batch.size(0)
        correct += (torch.argmax(pred, dim=1) == y_batch).float().sum().cpu()
    return float(correct / len(valid_dl.dataset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60_000, help="use only so many (for tests)")
    options = parser.parse_args()

    images = training_images(options.data_dir)
    validation = options.images // 6
    valid_dataset = Subset(images, torch.arange(validation))
    train_dataset = Subset(images, torch.arange(validation, options.images))
    torch.manual_seed(1)
    train_dl = DataLoader(train_dataset, 64, shuffle=True)
    valid_dl = DataLoader(valid_dataset, 64, shuffle=False)
    model = build_model().to(options.device)

    start = time.perf_counter()
    accuracy = train_epoch(model, train_dl, options.device)
    trained = time.perf_counter()
    val_accuracy = validate(model, valid_dl, options.device)
    finished = time.perf_counter()
    print(f"Epoch 1 accuracy: {accuracy:.4f} val_accuracy: {val_accuracy:.4f}")
    history = {"train_seconds": [trained - start], "validation_seconds": [finished - trained]}
    (options.out / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main()
