"""Well-known networks at their published sizes, with random weights: speed does not depend on what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

Block = Callable[[int, int, int], nn.Module]


class Residual(nn.Module):
    """A sum of a path and a shortcut, then ReLU."""

    def __init__(self, path: nn.Module, shortcut: nn.Module, act: bool = True) -> None:
        super().__init__()
        self.path, self.shortcut, self.act = path, shortcut, nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.path(x) + self.shortcut(x))


class Excite(nn.Module):
    """Squeeze-and-excitation of EfficientNet."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return x * self.gate(x)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act=nn.ReLU) -> nn.Sequential:
    """Convolution, norm, activation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([act()] if act else []))


def _basic(inputs: int, width: int, stride: int) -> nn.Module:
    path = nn.Sequential(conv(inputs, width, 3, stride), conv(width, width, act=None))
    plain = stride == 1 and inputs == width
    return Residual(path, nn.Identity() if plain else conv(inputs, width, 1, stride, act=None))


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    path = nn.Sequential(conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, 4 * width, 1, act=None))
    plain = stride == 1 and inputs == 4 * width
    return Residual(path, nn.Identity() if plain else conv(inputs, 4 * width, 1, stride, act=None))


def _resnet(block: Block, counts: list[int], expansion: int) -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(counts):
        for index in range(count):
            width = 64 << stage
            layers.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = width * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def resnet18() -> nn.Module:
    """He et al. 2016."""
    return _resnet(_basic, [2, 2, 2, 2], 1)


def resnet50() -> nn.Module:
    """He et al. 2016, with the stride at the 3x3 convolution."""
    return _resnet(_bottleneck, [3, 4, 6, 3], 4)


def vgg16() -> nn.Module:
    """Simonyan and Zisserman 2015, with norms."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(conv(inputs, width))
            inputs = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, *head)


def _inverted(inputs: int, outputs: int, kernel: int, stride: int, widen: int, act, excite: bool) -> nn.Module:
    middle = inputs * widen
    path = [conv(inputs, middle, 1, act=act)] if widen > 1 else []
    path.append(conv(middle, middle, kernel, stride, middle, act=act))
    if excite:
        path.append(Excite(middle, inputs // 4))
    path.append(conv(middle, outputs, 1, act=None))
    whole = nn.Sequential(*path)
    return Residual(whole, nn.Identity(), act=False) if stride == 1 and inputs == outputs else whole


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2, act=nn.ReLU6)]
    inputs = 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for widen, outputs, count, stride in stages:
        for index in range(count):
            layers.append(_inverted(inputs, outputs, 3, 1 if index else stride, widen, nn.ReLU6, False))
            inputs = outputs
    head = [conv(320, 1280, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *head)


def efficientnet_b0() -> nn.Module:
    """Tan and Le 2019."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2, act=nn.SiLU)]
    inputs = 32
    stages = [
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ]  # fmt: skip
    for widen, outputs, count, stride, kernel in stages:
        for index in range(count):
            layers.append(_inverted(inputs, outputs, kernel, 1 if index else stride, widen, nn.SiLU, True))
            inputs = outputs
    head = [conv(320, 1280, 1, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *head)


class Bert(nn.Module):
    """Devlin et al. 2019, from transformers' configuration."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(return_dict=False, attn_implementation="eager", use_cache=False)
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask)[0]


IMAGE = (1, 3, 224, 224)
NETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "VGG-16": vgg16,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-B0": efficientnet_b0,
    "BERT-base": Bert,
}


def write(name: str, path: Path) -> None:
    """Export a network, norms folded, with one image of 224x224 or 128 tokens."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # so that what goes in comes out
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    example: tuple[torch.Tensor, ...] = (torch.randn(IMAGE),)
    if name == "BERT-base":
        example = (torch.randint(0, 30000, (1, 128)), torch.ones((1, 128), dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, example, str(path), dynamo=False, opset_version=17)
