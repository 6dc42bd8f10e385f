"""The nets of `finetune.py` in torch, and how they are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from _lenet import LeNet5, LeNet300100
from onnxprune.converters.torch import AGPPruner
from torch import nn
from torch.nn import functional

version = torch.__version__
torch.set_num_threads(1)

__all__ = ["AGPPruner", "accuracy", "load", "make", "trainer", "version", "weights"]


class BiLSTM(nn.Module):
    """A bidirectional LSTM over series [N, T, 12], the mean of its outputs, 9 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 64, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(128, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


class AnimalCNN(nn.Module):
    """Three convolutions and two linear layers on 28x28 silhouettes: 94,186 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(576, 120)
        self.fc2 = nn.Linear(120, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image / 255
        for conv in (self.conv1, self.conv2, self.conv3):
            x = functional.max_pool2d(functional.relu(conv(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class Normed(nn.Module):
    """A convolution and a norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class WidePlain(nn.Module):
    """Convolutions of 32, then 128 channels at 5x5 positions, one behind the other: 334,570 parameters."""

    residual, count = False, 2

    def __init__(self) -> None:
        super().__init__()
        self.stem = Normed(1, 32, 2)
        self.first = Normed(32, 128, 3)
        self.body = nn.ModuleList([Normed(128, 128) for _ in range(self.count)])
        self.fc = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.first(functional.relu(self.stem(image / 255))))
        if self.residual:
            for inner, outer in zip(self.body[::2], self.body[1::2], strict=True):
                x = functional.relu(x + outer(functional.relu(inner(x))))
        else:
            for layer in self.body:
                x = functional.relu(layer(x))
        return self.fc(x.mean((2, 3))).float()


class WideResidual(WidePlain):
    """Two residual blocks in place of the convolutions behind the first ones: 629,994 parameters."""

    residual, count = True, 4


NETS: dict[str, type[nn.Module]] = {
    "lenet-300-100": LeNet300100,
    "lenet5": LeNet5,
    "bilstm": BiLSTM,
    "animal-cnn": AnimalCNN,
    "wide-plain": WidePlain,
    "wide-residual": WideResidual,
}


def make(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name]()


def trainer(
    net: nn.Module, teacher: nn.Module | None = None, temperature: float = 1.0, soft: float = 0.0
) -> Callable[[Any, Any, float], None]:
    """A function that takes one optimizer step (Adam) at a learning rate.

    `soft` is the share that the outputs of a teacher have in the loss.
    """
    optimizer = torch.optim.Adam(net.parameters())

    def step(x: Any, y: Any, learning_rate: float) -> None:
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        outputs = net(torch.from_numpy(x))
        loss = (1 - soft) * functional.cross_entropy(outputs, torch.from_numpy(y))
        if teacher is not None:
            with torch.no_grad():
                wanted = functional.softmax(teacher(torch.from_numpy(x)) / temperature, 1)
            loss = loss + soft * temperature**2 * functional.cross_entropy(outputs / temperature, wanted)
        loss.backward()
        optimizer.step()

    return step


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(net.state_dict())


def load(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    net.load_state_dict(state)


def accuracy(net: nn.Module, x: Any, y: Any) -> float:
    with torch.no_grad():
        return float((net(torch.from_numpy(x.astype("float32"))).argmax(1).numpy() == y).mean())
