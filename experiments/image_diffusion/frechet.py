"""The Frechet distance of image sets (FID, Heusel et al. 2017), in the features of a classifier of the same digits.

Inception's features are of photographs; here a small convolutional network is trained on the training split. It trains
on the CPU from a fixed seed, in seconds, so that distances of different runs are in the same features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CLASSES, SIDE, Digits

FEATURES = 32
EPOCHS = 20
BATCH = 64
PIXEL_NOISE, LABEL_SMOOTHING = 0.3, 0.1  # against features that know the training images themselves


class Classifier(nn.Module):
    """Digits to classes; `features` is the layer before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, SIDE, SIDE)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * SIDE * SIDE // 4, FEATURES),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """images (n, 64) -> (n, 32)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.gelu(self.features(images)))


def train_classifier(digits: Digits, seed: int = 0, epochs: int = EPOCHS) -> Classifier:
    """On the CPU, one thread's arithmetic: the same weights wherever the same torch runs on the same processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for index in torch.randperm(len(digits.train)).split(BATCH):
                images = digits.train[index]
                noised = images + PIXEL_NOISE * torch.randn(images.shape)
                loss = F.cross_entropy(model(noised), digits.train_labels[index], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).double().mean().item()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features' means and covariances. one, other: (n, f)."""
    one, other = one.double(), other.double()
    difference = one.mean(0) - other.mean(0)
    first, second = one.T.cov(), other.T.cov()
    root = _root(first)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()  # trace of (C1 C2)^(1/2)
    return max(0.0, float(difference.square().sum() + first.trace() + second.trace() - 2 * cross))


def _root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Judge:
    """Frechet distances of images to the two splits, in the classifier's features and in the pixels themselves.

    baseline: the training split scored as if it were samples, as good as that many samples can be; class_accuracy is
        of the held-out images there.
    """

    def __init__(self, digits: Digits, epochs: int = EPOCHS) -> None:
        self._classifier = train_classifier(digits, epochs=epochs)
        self._pixels = {"train": digits.train, "test": digits.test}
        self._features = {name: self._features_of(images) for name, images in self._pixels.items()}
        self.baseline = self.scores(digits.train, digits.train_labels)
        self.baseline["class_accuracy"] = accuracy(self._classifier, digits.test, digits.test_labels)

    def scores(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """fd_*: features; pixel_fd_*: pixels; class_accuracy: how often the classifier sees the class asked for."""
        images, labels = images.float().cpu(), labels.cpu()
        features = self._features_of(images)
        return {
            "fd_test": frechet_distance(features, self._features["test"]),
            "fd_train": frechet_distance(features, self._features["train"]),
            "pixel_fd_test": frechet_distance(images, self._pixels["test"]),
            "pixel_fd_train": frechet_distance(images, self._pixels["train"]),
            "class_accuracy": accuracy(self._classifier, images, labels),
        }

    @torch.no_grad()
    def _features_of(self, images: Tensor) -> Tensor:
        return self._classifier.features(images)
