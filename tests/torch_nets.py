"""Small torch nets, one for each kind of layer a bridge knows, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class First(nn.Module):
    """A recurrent layer's outputs without its state."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self, width: int = 8, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.fc = nn.Linear(8, width)

    def forward(self, x, y=None):
        y = x if y is None else y
        return self.fc(self.attention(x, y, y)[0])


class Tied(nn.Module):
    """A language model's head on its embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


class Cells(nn.Module):
    """Cells over three steps, so that their recurrent weights see a state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 5), nn.GRUCell(5, 6), nn.RNNCell(6, 3)

    def forward(self, x):
        a = b = c = None
        for i in range(3):
            a = self.lstm(x[:, i], a)
            b = self.gru(a[0], b)
            c = self.rnn(b, c)
        return c


class Twice(nn.Module):
    """One layer used twice, under two names; a bias-free, a transposed and a functional use."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.own = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.tanh(self.again(torch.tanh(self.first(x)))) @ self.own


def lenet5() -> nn.Sequential:
    """On (N, 1, 12, 12), with BatchNorm and Dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def floats(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(shape),)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)), floats(3, 4)),
    "linear 3-d": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), floats(2, 3, 4)),
    "bilinear": (lambda: nn.Bilinear(4, 5, 6), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), floats(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), floats(2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), floats(2, 4, 5, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), floats(2, 4, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), floats(2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), floats(2, 4, 3, 3, 3)),
    "lenet5": (lenet5, floats(4, 1, 12, 12)),
    "lstm": (lambda: First(nn.LSTM(4, 5)), floats(7, 2, 4)),
    "lstm two-way": (lambda: First(nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)), floats(2, 7, 4)),
    "gru two-way": (lambda: First(nn.GRU(4, 5, bidirectional=True, batch_first=True)), floats(2, 7, 4)),
    "rnn two-way": (lambda: First(nn.RNN(4, 5, bidirectional=True, batch_first=True)), floats(2, 4, 4)),
    "cells": (Cells, floats(2, 3, 4)),
    "attention": (Attention, floats(2, 7, 8)),
    "attention, other widths": (
        lambda: Attention(kdim=6, vdim=6),
        lambda: (torch.randn(2, 7, 8), torch.randn(2, 9, 6)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
        ),
        floats(2, 7, 8),
    ),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        lambda: (torch.randn(2, 7, 8), torch.randn(2, 5, 8)),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)),
        lambda: (torch.randint(0, 20, (2, 3)),),
    ),
    "embedding bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3)),
        lambda: (torch.randint(0, 20, (2, 3)),),
    ),
    "tied": (Tied, lambda: (torch.randint(0, 20, (2, 3)),)),
}
"""Name -> how to make the net and its inputs."""


def make(name: str, *, ties: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Any]:
    """A net of the table and its inputs; `ties` rounds its weights to a few values, so that many share a magnitude."""
    torch.manual_seed(seed)
    build, inputs = NETS[name]
    net = build()
    if ties:
        with torch.no_grad():
            for value in net.parameters():
                if value.ndim > 1:
                    value.copy_(torch.randn(value.shape).mul(1.5).round())
    return net.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs())
