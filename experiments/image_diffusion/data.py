"""The digits that ship with scikit-learn: 1797 images of 8 x 8 pixels, 17 levels of grey, written by 43 people.

They are the test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak 1998).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 8
CLASSES = 10
HELD_OUT = 5  # every fifth image


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) float32 in [-1, 1], row by row; labels (n,) int64."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    sha256: str

    def to(self, device: torch.device | str) -> Digits:
        train, train_labels = self.train.to(device), self.train_labels.to(device)
        return Digits(train, train_labels, self.test.to(device), self.test_labels.to(device), self.sha256)


def load_digits() -> Digits:
    """ImportError says what to install where scikit-learn is missing."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("expected scikit-learn for its images: pip install scikit-learn") from error
    found = datasets.load_digits()
    images = torch.from_numpy(found.data).float() / 8 - 1
    return split(images, torch.from_numpy(found.target).long())


def split(images: Tensor, labels: Tensor) -> Digits:
    """A fixed random fifth is held out: in the file's order, neighbours are of one writer."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    test, train = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    return Digits(images[train], labels[train], images[test], labels[test], digest)
