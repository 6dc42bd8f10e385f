"""Torch nets whose channels and heads are cut: what they are made of, and what is to be left of them at one half."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """A stem, a block of a depthwise and a pointwise convolution with a residual sum, norms of three kinds, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.up, self.act = nn.Conv2d(16, 32, 1), nn.PReLU(32)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.down, self.norm = nn.Conv2d(32, 16, 1), nn.InstanceNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.sigmoid(self.bn2(self.depth(self.act(self.up(x)))))
        return self.fc(self.norm(x + self.down(y)).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.Module], **options):
        super().__init__()
        self.inside = nn.Linear(6, 8)
        self.rnn = kind(8, 12, batch_first=True, **options)
        self.fc = nn.Linear(24 if options.get("bidirectional") else 12, 5)

    def forward(self, x):
        return self.fc(self.rnn(torch.relu(self.inside(x)))[0].mean(1))


class Attend(nn.Module):
    """Attention written out, as models of images do: heads merged into one projection."""

    def __init__(self, width: int = 16, heads: int = 4):
        super().__init__()
        self.num_heads, self.head_dim, self.inner_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(8, 3 * width), nn.Linear(width, 8)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-1, -2) / self.head_dim**0.5, -1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, self.inner_dim)).mean(1)


class HardWired(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Flat()
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.body(x)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).view(-1, 8 * 36))


class Constant(nn.Module):
    """A tensor for each channel that is no parameter, and that zeros in the masked module do not silence."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5)
        self.offset = torch.linspace(1, 2, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) + self.offset)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 12), nn.ReLU(),
        nn.Linear(12, 5),
    )  # fmt: skip


def heads(kind: str) -> nn.Module:
    import transformers as hf

    common = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 32}
    if kind == "bert":
        config = hf.BertConfig(vocab_size=30, max_position_embeddings=16, **common)
        return hf.BertModel(config, add_pooling_layer=False)
    config = hf.LlamaConfig(vocab_size=30, num_key_value_heads=2, use_cache=False, **common)
    return hf.LlamaModel(config)


SEQ = (2, 7, 6)
NETS = {
    "plain": (plain, images, {"0.weight": (8, 4), "5.weight": (12, 6)}),
    "residual": (Residual, images, {"stem.weight": (16, 8), "up.weight": (32, 16)}),
    "group norm": (Grouped, images, {"a.weight": (4, 2), "b.weight": (8, 4)}),
    "lstm": (
        lambda: Sequence(nn.LSTM, bidirectional=True),
        lambda: images(*SEQ),
        {"inside.weight": (8, 4), "rnn.weight_ih_l0": (12, 6)},
    ),
    "gru": (lambda: Sequence(nn.GRU), lambda: images(*SEQ), {"inside.weight": (8, 4), "rnn.weight_ih_l0": (12, 6)}),
    "attention": (Attend, lambda: images(2, 7, 8), {"qkv.weight": (4, 2)}),
}
"""Name -> the net, its inputs, and the groups: channels, and how many of them are left at one half."""

SHAPES = {
    "plain": {"0.weight": (4, 3, 3, 3), "1.running_var": (4,), "5.weight": (6, 36), "7.weight": (5, 6)},
    "residual": {
        "stem.weight": (8, 3, 3, 3), "bn.running_mean": (8,), "up.weight": (16, 8, 1, 1), "act.weight": (16,),
        "depth.weight": (16, 1, 3, 3), "down.weight": (8, 16, 1, 1), "down.bias": (8,), "fc.weight": (5, 8),
    },
    "group norm": {"a.weight": (8, 3, 3, 3), "norm.weight": (8,), "b.weight": (8, 4, 3, 3), "fc.weight": (5, 4)},
    "lstm": {
        "rnn.weight_ih_l0": (24, 4), "rnn.weight_hh_l0_reverse": (24, 6), "rnn.bias_hh_l0": (24,),
        "fc.weight": (5, 12),
    },
    "gru": {"rnn.weight_ih_l0": (18, 4), "rnn.weight_hh_l0": (18, 6), "rnn.bias_ih_l0": (18,), "fc.weight": (5, 6)},
    "attention": {"qkv.weight": (24, 8), "qkv.bias": (24,), "proj.weight": (8, 8)},
}  # fmt: skip

RECORDED = {
    "plain": {"0": {"out_channels": 4}, "1": {"num_features": 4}, "5": {"in_features": 36, "out_features": 6}},
    "residual": {
        "depth": {"in_channels": 16, "out_channels": 16, "groups": 16}, "act": {"num_parameters": 16},
        "norm": {"num_features": 8}, "down": {"in_channels": 16, "out_channels": 8, "groups": 1},
    },
    "group norm": {"norm": {"num_channels": 8, "num_groups": 2}, "b": {"in_channels": 8, "out_channels": 4}},
    "lstm": {"rnn": {"input_size": 4, "hidden_size": 6, "num_layers": 1}},
    "gru": {"rnn": {"input_size": 4, "hidden_size": 6}},
    "attention": {"": {"num_heads": 2, "head_dim": 4, "inner_dim": 8}, "qkv": {"out_features": 24}},
}  # fmt: skip


def build(name: str):
    torch.manual_seed(0)
    make_net, make_inputs, groups = NETS[name]
    net, x = make_net(), make_inputs()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.weight.normal_()
                part.bias.normal_()
    return net, x, groups
