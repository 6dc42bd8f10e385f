"""Hand-written torch nets, one for each structure whose channels hang together in a way of its own.

`NETS[name](width)` is a net of that base width (a multiple of 4) and its inputs. With a width of 8 a net is tested in
a tenth of a second; from 64 up channel counts suit the kernels, and its latency says something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Net = tuple[nn.Module, tuple[torch.Tensor, ...]]


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Biases, scales and statistics as training leaves them: none of them 0 or 1, no two alike."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if value.ndim == 1 and value.is_floating_point():
                noise = torch.rand(value.shape, generator=made)
                value += noise - (0.0 if "var" in name else 0.5)
    return net.eval()


def image(width: int) -> tuple[torch.Tensor]:
    """Larger for wider nets."""
    return (torch.randn(1, 3, *(16, 16) if width <= 16 else (64, 64)),)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    """Convolution, BatchNorm and, unless told, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *[nn.ReLU()] * act)


class Sum(nn.Module):
    """The sum of branches, and ReLU."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return functional.relu(sum(branch(x) for branch in self.branches))


class Cat(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def head(inputs: int, classes: int = 10) -> list[nn.Module]:
    """Global pooling and a linear classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


def plain(w: int) -> Net:
    """Convolutions in a row."""
    body = [conv(3, w), conv(w, 2 * w, stride=2), conv(2 * w, 2 * w), conv(2 * w, 4 * w, stride=2)]
    return nn.Sequential(*body, *head(4 * w)), image(w)


def vgg(w: int) -> Net:
    """Convolutions with biases, pooling, and a Flatten that spreads each channel over 16 inputs."""
    body: list[nn.Module] = []
    for inputs, outputs in ((3, w), (w, 2 * w)):
        body += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        body += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    tail = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * w, 4 * w), nn.ReLU(), nn.Linear(4 * w, 10)]
    return nn.Sequential(*body, *tail), image(w)


def resnet_basic(w: int) -> Net:
    """Residual sums of two convolutions, with and without a projection."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        same = inputs == outputs and stride == 1
        short = nn.Identity() if same else conv(inputs, outputs, 1, stride, act=False)
        return Sum(short, nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, act=False)))

    body = [conv(3, w), nn.MaxPool2d(2), block(w, w, 1), block(w, w, 1), block(w, 2 * w, 2), block(2 * w, 2 * w, 1)]
    return nn.Sequential(*body, *head(2 * w)), image(w)


def _bottleneck(inputs: int, middle: int, outputs: int, stride: int, groups: int = 1) -> nn.Module:
    same = inputs == outputs and stride == 1
    short = nn.Identity() if same else conv(inputs, outputs, 1, stride, act=False)
    long = [conv(inputs, middle, 1), conv(middle, middle, 3, stride, groups), conv(middle, outputs, 1, act=False)]
    return Sum(short, nn.Sequential(*long))


def resnet_bottleneck(w: int) -> Net:
    """Residual sums of 1x1, 3x3, 1x1."""
    blocks = [_bottleneck(w, w, 4 * w, 1), _bottleneck(4 * w, w, 4 * w, 1), _bottleneck(4 * w, 2 * w, 8 * w, 2)]
    return nn.Sequential(conv(3, w), nn.MaxPool2d(2), *blocks, *head(8 * w)), image(w)


def resnext(w: int) -> Net:
    """Bottlenecks around grouped convolutions."""
    blocks = [_bottleneck(w, 2 * w, 4 * w, 1, 4), _bottleneck(4 * w, 2 * w, 4 * w, 1, 4)]
    return nn.Sequential(conv(3, w), nn.MaxPool2d(2), *blocks, *head(4 * w)), image(w)


class UNet(nn.Module):
    """Down twice, up twice, each level beside what came down at its size."""

    def __init__(self, w: int, transpose: bool):
        super().__init__()
        self.down1, self.down2, self.bottom = self.two(3, w), self.two(w, 2 * w), self.two(2 * w, 4 * w)
        self.up1, self.up2 = self.up(4 * w, 2 * w, transpose), self.up(2 * w, w, transpose)
        self.level1, self.level2, self.out = self.two(4 * w, 2 * w), self.two(2 * w, w), nn.Conv2d(w, 5, 1)

    @staticmethod
    def two(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(conv(inputs, outputs), conv(outputs, outputs))

    @staticmethod
    def up(inputs: int, outputs: int, transpose: bool) -> nn.Module:
        if transpose:
            return nn.ConvTranspose2d(inputs, outputs, 2, 2)
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(functional.max_pool2d(first, 2))
        x = self.bottom(functional.max_pool2d(second, 2))
        x = self.level1(torch.cat([second, self.up1(x)], 1))
        return self.out(self.level2(torch.cat([first, self.up2(x)], 1)))


class C2f(nn.Module):
    """YOLOv8's block: one half goes on through bottlenecks, and all stages are put side by side."""

    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__()
        half = outputs // 2
        self.first = conv(inputs, outputs, 1)
        self.stages = nn.ModuleList(nn.Sequential(conv(half, half), conv(half, half)) for _ in range(depth))
        self.last = conv((2 + depth) * half, outputs, 1)

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for stage in self.stages:
            parts.append(parts[-1] + stage(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """C2f down, spatial pyramid pooling, Resize, Concat, C2f, and box coordinates from a grid."""

    def __init__(self, w: int):
        super().__init__()
        self.stem, self.c1 = conv(3, w, stride=2), C2f(w, w, 1)
        self.down, self.c2 = conv(w, 2 * w, stride=2), C2f(2 * w, 2 * w, 2)
        self.narrow, self.wide = conv(2 * w, w, 1), conv(4 * w, 2 * w, 1)
        self.c3, self.out = C2f(3 * w, w, 1), nn.Conv2d(w, 4 * 4 + 3, 1)

    def forward(self, x):
        small = functional.silu(self.c1(self.stem(x)))
        y = self.narrow(self.c2(self.down(small)))
        pools = [y]
        for _ in range(3):
            pools.append(functional.max_pool2d(pools[-1], 5, 1, 2))
        y = self.wide(torch.cat(pools, 1))
        y = self.out(self.c3(torch.cat([functional.interpolate(y, scale_factor=2.0), small], 1))).flatten(2)
        boxes, classes = y.split((16, 3), 1)
        return torch.cat([boxes.reshape(1, 4, 4, -1).transpose(1, 2).softmax(1).sum(1), classes.sigmoid()], 1)


class Shuffle(nn.Module):
    """ShuffleNet's channel shuffle."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        n, c, h, w = x.shape
        return x.reshape(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v1(w: int) -> Net:
    """Grouped 1x1 convolutions with a shuffle between them."""

    def block() -> nn.Module:
        long = [conv(2 * w, w, 1, groups=2), Shuffle(2), conv(w, w, groups=w, act=False)]
        return Sum(nn.Identity(), nn.Sequential(*long, conv(w, 2 * w, 1, groups=2, act=False)))

    return nn.Sequential(conv(3, 2 * w, stride=2), block(), block(), *head(2 * w)), image(w)


class ShuffleV2(nn.Module):
    """One half passes by; then both are shuffled."""

    def __init__(self, w: int):
        super().__init__()
        half = w // 2
        self.body = nn.Sequential(conv(half, half, 1), conv(half, half, groups=half, act=False), conv(half, half, 1))
        self.shuffle = Shuffle(2)

    def forward(self, x):
        left, right = x.chunk(2, 1)
        return self.shuffle(torch.cat([left, self.body(right)], 1))


def shufflenet_v2(w: int) -> Net:
    """Split, half a body, Concat, shuffle."""
    return nn.Sequential(conv(3, 2 * w, stride=2), ShuffleV2(2 * w), ShuffleV2(2 * w), *head(2 * w)), image(w)


def googlenet(w: int) -> Net:
    """Inception blocks: four branches side by side."""

    def block(inputs: int) -> nn.Module:
        return Cat(
            conv(inputs, w, 1),
            nn.Sequential(conv(inputs, w, 1), conv(w, 2 * w)),
            nn.Sequential(conv(inputs, w // 2, 1), conv(w // 2, w, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, w, 1)),
        )

    return nn.Sequential(conv(3, w, stride=2), block(w), nn.MaxPool2d(2), block(5 * w), *head(5 * w)), image(w)


def squeezenet(w: int) -> Net:
    """Fire modules: a narrow layer, then 1x1 and 3x3 side by side; the classifier is a convolution."""

    def fire(inputs: int) -> nn.Module:
        return nn.Sequential(conv(inputs, w // 2, 1), Cat(conv(w // 2, w, 1), conv(w // 2, w)))

    tail = [nn.Conv2d(2 * w, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(conv(3, w, stride=2), fire(w), nn.MaxPool2d(2), fire(2 * w), *tail), image(w)


class Dense(nn.Module):
    """A DenseNet layer: what it makes goes beside what it got. Each reader has a BatchNorm of its own."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, 2 * growth, 1))
        self.last = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.last(self.body(x))], 1)


def densenet(w: int) -> Net:
    """Dense blocks and a transition."""
    body = [nn.Conv2d(3, w, 3, padding=1), Dense(w, w), Dense(2 * w, w)]
    transition = [nn.BatchNorm2d(3 * w), nn.ReLU(), nn.Conv2d(3 * w, w, 1), nn.AvgPool2d(2)]
    tail = [Dense(w, w), nn.BatchNorm2d(2 * w), nn.ReLU(), *head(2 * w)]
    return nn.Sequential(*body, *transition, *tail), image(w)


class SqueezeExcite(nn.Module):
    """Channels scaled by what a small net makes of their means."""

    def __init__(self, w: int, linear: bool):
        super().__init__()
        self.linear = linear
        make = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.body = nn.Sequential(make(w, w // 4 * 2), nn.ReLU(), make(w // 4 * 2, w), nn.Sigmoid())

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=not self.linear)
        scale = self.body(mean)
        return x * (scale[:, :, None, None] if self.linear else scale)


def senet(w: int) -> Net:
    """Squeeze-and-excite, with linear layers and with convolutions, inside and outside a residual sum."""
    block = Sum(nn.Identity(), nn.Sequential(conv(w, w), conv(w, w, act=False), SqueezeExcite(w, True)))
    body = [conv(3, w, stride=2), block, conv(w, 2 * w), SqueezeExcite(2 * w, False), nn.PReLU(2 * w)]
    return nn.Sequential(*body, *head(2 * w)), image(w)


def mobilenet_v2(w: int) -> Net:
    """Inverted residuals: depthwise convolutions in wide layers between narrow sums."""

    class Inverted(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            wide = 3 * inputs
            depthwise = [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()]
            expand = [nn.Conv2d(inputs, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish()]
            self.body = nn.Sequential(*expand, *depthwise, conv(wide, outputs, 1, act=False))
            self.short = inputs == outputs and stride == 1

        def forward(self, x):
            return x + self.body(x) if self.short else self.body(x)

    body = [conv(3, w, stride=2), Inverted(w, w, 1), Inverted(w, 2 * w, 2), Inverted(2 * w, 2 * w, 1)]
    return nn.Sequential(*body, conv(2 * w, 4 * w, 1), *head(4 * w)), image(w)


class Crnn(nn.Module):
    """Text recognition: convolutions, columns of the image as steps, two biLSTM layers."""

    def __init__(self, w: int):
        super().__init__()
        self.body = nn.Sequential(conv(1, w), nn.MaxPool2d(2), conv(w, w), nn.MaxPool2d((2, 1)))
        self.lstm = nn.LSTM(4 * w, w, num_layers=2, bidirectional=True)
        self.out = nn.Linear(2 * w, 11)

    def forward(self, x):
        x = self.body(x)
        n, c, h, w = x.shape
        x = x.reshape(n, c * h, w).permute(2, 0, 1)
        return self.out(self.lstm(x)[0]).log_softmax(-1)


class Recurrent(nn.Module):
    """A GRU over a sequence whose inputs come from a linear layer, and its last state."""

    def __init__(self, w: int):
        super().__init__()
        self.first, self.gru, self.out = nn.Linear(5, w), nn.GRU(w, 2 * w, batch_first=True), nn.Linear(2 * w, 7)

    def forward(self, x):
        return self.out(self.gru(functional.relu(self.first(x)))[1][0])


class Attention(nn.Module):
    """Self-attention with any number of key-value heads; queries, keys and values from one matrix or from three."""

    def __init__(self, w: int, heads: int, shared: int, merged: bool, causal: bool = False):
        super().__init__()
        self.heads, self.shared, self.size, self.merged, self.causal = heads, shared, w // heads, merged, causal
        sizes = [w, shared * self.size, shared * self.size]
        self.inputs = nn.ModuleList(nn.Linear(w, size) for size in ([sum(sizes)] if merged else sizes))
        self.sizes, self.out = sizes, nn.Linear(w, w)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.inputs[0](x).split(self.sizes, -1) if self.merged else (layer(x) for layer in self.inputs)
        q = q.reshape(n, t, self.heads, self.size).transpose(1, 2)
        k, v = (y.reshape(n, t, self.shared, self.size).transpose(1, 2) for y in (k, v))
        if 1 < self.shared < self.heads:  # as transformers repeats key-value heads
            times = self.heads // self.shared
            k, v = (
                y[:, :, None].expand(n, self.shared, times, t, self.size).reshape(n, self.heads, t, self.size)
                for y in (k, v)
            )
        scores = q @ k.transpose(2, 3) / math.sqrt(self.size)
        if self.causal:
            scores = scores + torch.full((t, t), -1e4).triu(1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Gated(nn.Module):
    """LLaMA's feed-forward net (SwiGLU)."""

    def __init__(self, w: int, inner: int, merged: bool = False):
        super().__init__()
        self.merged = merged
        self.inputs = nn.ModuleList(nn.Linear(w, n, bias=False) for n in ([2 * inner] if merged else [inner] * 2))
        self.out = nn.Linear(inner, w, bias=False)

    def forward(self, x):
        gate, up = self.inputs[0](x).chunk(2, -1) if self.merged else (layer(x) for layer in self.inputs)
        return self.out(functional.silu(gate) * up)


class Layer(nn.Module):
    """A transformer layer on linear inputs: norms before attention and feed-forward, sums after."""

    def __init__(self, w: int, attention: nn.Module, forward: nn.Module):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(w) for _ in range(2))
        self.attention, self.feed_forward = attention, forward

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class Encoder(nn.Module):
    """torch's own attention, from the outside: norms after sums, ReLU."""

    def __init__(self, w: int):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(w, 4, batch_first=True), nn.LayerNorm(w)
        self.feed_forward = nn.Sequential(nn.Linear(w, 2 * w), nn.ReLU(), nn.Linear(2 * w, w))

    def forward(self, x):
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return x + self.feed_forward(x)


def _transformer(w: int, attention: Sequence[nn.Module], feed_forward: Callable[[], nn.Module]) -> Net:
    layers = [Layer(w, one, feed_forward()) for one in attention]
    return nn.Sequential(*layers, nn.LayerNorm(w), nn.Linear(w, 10)), (torch.randn(1, 6 if w <= 32 else 64, w),)


def _mlp(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(w, 2 * w), nn.GELU(), nn.Linear(2 * w, w))


NETS: dict[str, Callable[[int], Net]] = {
    "plain CNN": plain,
    "VGG": vgg,
    "ResNet basic": resnet_basic,
    "ResNet bottleneck": resnet_bottleneck,
    "ResNeXt": resnext,
    "U-Net ConvTranspose": lambda w: (UNet(w, True), image(w)),
    "U-Net Resize": lambda w: (UNet(w, False), image(w)),
    "YOLO C2f": lambda w: (Yolo(w), image(w)),
    "ShuffleNet v1": shufflenet_v1,
    "ShuffleNet v2": shufflenet_v2,
    "GoogLeNet": googlenet,
    "SqueezeNet": squeezenet,
    "DenseNet": densenet,
    "SE net": senet,
    "MobileNetV2": mobilenet_v2,
    "CRNN biLSTM": lambda w: (Crnn(w), (torch.randn(1, 1, 16, 24 if w <= 16 else 96),)),
    "GRU": lambda w: (Recurrent(w), (torch.randn(2, 6, 5),)),
    "SwiGLU": lambda w: _transformer(2 * w, [nn.Linear(2 * w, 2 * w)], lambda: Gated(2 * w, 4 * w)),
    "SwiGLU merged": lambda w: _transformer(2 * w, [nn.Linear(2 * w, 2 * w)], lambda: Gated(2 * w, 4 * w, True)),
    "attention separate": lambda w: _transformer(
        2 * w, [Attention(2 * w, 4, 4, False), Attention(2 * w, 4, 4, False, True)], lambda: _mlp(2 * w)
    ),
    "attention merged": lambda w: _transformer(2 * w, [Attention(2 * w, 4, 4, True)], lambda: _mlp(2 * w)),
    "attention multi-query": lambda w: _transformer(2 * w, [Attention(2 * w, 4, 1, False)], lambda: _mlp(2 * w)),
    "attention grouped-query": lambda w: _transformer(2 * w, [Attention(2 * w, 8, 4, False)], lambda: _mlp(2 * w)),
    "MultiheadAttention": lambda w: (
        Encoder(2 * w),
        (torch.randn(1, 6 if w <= 16 else 64, 2 * w),),
    ),
}


def net(name: str, width: int = 8) -> Net:
    """A net with its inputs, the same at every call."""
    torch.manual_seed(0)
    module, inputs = NETS[name](width)
    return randomised(module), inputs


def export(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], target: str, exporter: str, dims: Sequence[int] = ()
) -> None:
    """Write a net as ONNX.

    Args:
        module: in eval mode.
        inputs: example inputs.
        target: the file.
        exporter: 'dynamo' or 'legacy'; with ' unfolded', BatchNorms are not merged into convolutions.
        dims: of the one input that are to be open.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator has no ONNX
    unfolded = exporter.endswith("unfolded")
    options: dict[str, Any] = {}
    if dims and exporter.startswith("dynamo"):
        options["dynamic_shapes"] = ({axis: torch.export.Dim.DYNAMIC for axis in dims},)
    elif dims:
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {axis: f"d{axis}" for axis in dims}}}
    if exporter.startswith("dynamo"):
        options |= {"dynamo": True, "verbose": False, "external_data": False, "optimize": not unfolded}
    else:
        mode = torch.onnx.TrainingMode.PRESERVE if unfolded else torch.onnx.TrainingMode.EVAL
        options |= {"dynamo": False, "training": mode, "do_constant_folding": not unfolded}
    with torch.no_grad():
        torch.onnx.export(module, inputs, target, **options)
