"""The two nets of Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", in torch.

Both take pixel values 0..255 as float32 [N, 1, 28, 28] and scale them inside, so that an exported graph needs no
preprocessing; both return logits [N, 10].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _data import augmented_batches
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional


class LeNet300100(nn.Module):
    """LeNet-300-100: two hidden layers, 266,610 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = (image / 255).reshape(-1, 28 * 28)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


class LeNet5(nn.Module):
    """LeNet-5 as Caffe ships it: 431,080 parameters; max pooling is the only non-linearity of the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image / 255
        x = functional.max_pool2d(self.conv1(x), 2)
        x = functional.max_pool2d(self.conv2(x), 2)
        x = functional.relu(self.fc1(x.reshape(-1, 50 * 4 * 4)))
        return self.fc2(x)


NETS: dict[str, type[nn.Module]] = {"lenet-300-100": LeNet300100, "lenet5": LeNet5}
"""By the name of their file."""


def train(
    net: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    seed: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train in place: AdamW, one cycle of the learning rate up to `learning_rate`, batches of 64 augmented images.

    `after_epoch` is called with the number of the epoch, counted from 1, when it is finished.
    """
    size = 64
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * (len(images) // size))
    net.train()
    for epoch in range(1, epochs + 1):
        for x, y in _tensors(augmented_batches(images, labels, rng, size)):
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
        after_epoch(epoch)
    net.eval()


def accuracy(net: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Return the share of images [N, 1, 28, 28] whose largest logit is the label's."""
    training = net.training
    net.eval()
    with torch.no_grad():
        predicted = net(torch.from_numpy(images.astype(np.float32))).argmax(1).numpy()
    net.train(training)
    return float((predicted == labels).mean())


def _tensors(batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches)
