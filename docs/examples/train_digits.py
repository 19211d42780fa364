"""Train a small network of `srm_core.nn.ConvBN2d` on scikit-learn's digits, and its twin of torch's own layers.

    pip install 'srm-core[torch]' scikit-learn
    python docs/examples/train_digits.py

Both begin with the same weights and see the same images in the same order; the twin is what ConvBN2d stands for, a
Conv2d, a BatchNorm2d and a ReLU, and its state dict is loaded as it is.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from srm_core.nn import ConvBN2d


class Pair(nn.Module):
    """Conv2d, BatchNorm2d, ReLU, under the names that ConvBN2d has for them."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, outward, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outward)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def fused(inward: int, outward: int, stride: int) -> ConvBN2d:
    return ConvBN2d(inward, outward, 3, stride, padding=1, activation="relu")


def network(layer: type[Pair] | type[ConvBN2d]) -> nn.Module:
    """(B, 1, 8, 8) -> (B, 10): three convolutions, then the mean of what is left of the image."""
    make = Pair if layer is Pair else fused
    body = [make(1, 16, 1), make(16, 32, 2), make(32, 64, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) to train on, then a fifth of all to test; images (B, 1, 8, 8) in [0, 1]."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    held = len(images) // 5
    return images[held:], labels[held:], images[:held], labels[:held]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """The last batch's loss."""
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shuffle = torch.Generator().manual_seed(1)
    loss = torch.zeros(())
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=shuffle).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optim.zero_grad()
            loss.backward()
            optim.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()  # ConvBN2d folds its batch norm into the weight here, once
    return (model(images).argmax(-1) == labels).float().mean().item()


def run(epochs: int = 6) -> dict[str, float]:
    """The accuracies of both, by name."""
    *training, test_images, test_labels = digits()
    torch.manual_seed(0)
    twin, ours = network(Pair), network(ConvBN2d)
    ours.load_state_dict(twin.state_dict())
    found = {}
    for name, model in (("torch", twin), ("srm_core.nn", ours)):
        loss = train(model, *training, epochs)
        found[name] = accuracy(model, test_images, test_labels)
        print(f"{name:12} loss {loss:.4f}, {found[name]:.1%} of {len(test_images)} test images right")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    run(parser.parse_args().epochs)
