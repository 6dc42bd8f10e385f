"""Hand-written nets, exported, cut and held against themselves with zeros; their groups are stated literally."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import channel_nets

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, load
from onnxprune.structure import shrink, verify
from onnxprune.structure.coupling import Coupling
from onnxprune.structure.plan import Plan
from onnxprune.structure.rules import RULES
from onnxprune.structure.site import Rule, Site

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's exporters, of their own code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

OUTPUT, INPUT = "graph output", "graph input"
STREAM = f"16 {INPUT}"
"""A transformer layer's sum with its input."""

EXPECTED: dict[str, tuple[str, list[str]]] = {
    # size of each group; where a channel is several rows of its first weight, x that many; h are heads
    "plain CNN": ("8 16 16 32", [f"10 {OUTPUT}"]),
    "VGG": ("8 8 16 16 32", [f"10 {OUTPUT}"]),
    "ResNet basic": ("8 8 8 16 16 16", [f"10 {OUTPUT}"]),
    "ResNet bottleneck": ("8 8 8 8 8 16 16 32 64", [f"10 {OUTPUT}"]),
    "ResNeXt": ("4x4 4x4 8 32", [f"10 {OUTPUT}"]),
    "U-Net ConvTranspose": ("8 8 8 8 8 16 16 16 16 16 32 32", [f"5 {OUTPUT}"]),
    "U-Net Resize": ("8 8 8 8 8 16 16 16 16 16 32 32", [f"5 {OUTPUT}"]),
    "YOLO C2f": ("4 4 4 4 4 4 8 8 8 8 8 8 8 8 16 16 16", [f"19 {OUTPUT}"]),
    "ShuffleNet v1": ("2x4 2x4 8x2", [f"10 {OUTPUT}"]),
    "ShuffleNet v2": ("4 4 8 8 8", [f"10 {OUTPUT}"]),
    "GoogLeNet": ("4 4 8 8 8 8 8 8 8 8 8 16 16", [f"10 {OUTPUT}"]),
    "SqueezeNet": ("4 4 8 8 8 8 8", [f"10 {OUTPUT}"]),
    "DenseNet": ("8 8 8 8 8 16 16 16", [f"10 {OUTPUT}"]),
    "SE net": ("4 8 8 8 16", [f"10 {OUTPUT}"]),
    "MobileNetV2": ("8 16 24 24 32 48", [f"10 {OUTPUT}"]),
    "CRNN biLSTM": ("8 8 8x4 8x4", ["11 LogSoftmax mixes axis 2"]),
    "GRU": ("8 16x3", [f"7 {OUTPUT}"]),
    "SwiGLU": ("32", [STREAM, STREAM, f"10 {OUTPUT}"]),
    "SwiGLU merged": ("32x2", [STREAM, STREAM, f"10 {OUTPUT}"]),
    "attention separate": ("4x4h 4x4h 32 32", [*[STREAM] * 4, f"10 {OUTPUT}"]),
    "attention merged": ("4x12h 32", [STREAM, STREAM, f"10 {OUTPUT}"]),
    "attention multi-query": (
        "4x4h 32",
        # one key-value head serves all query heads: it stays
        ["4 Reshape holds 4 heads of 4 positions, which go as a whole"] * 2 + [STREAM, STREAM, f"10 {OUTPUT}"],
    ),
    "attention grouped-query": ("4x4h 32", [STREAM, STREAM, f"10 {OUTPUT}"]),
    "MultiheadAttention": ("4x12h 32", [STREAM, STREAM]),
}


def found(coupling: Coupling) -> tuple[str, list[str]]:
    """The groups and pins of a model as `EXPECTED` states them."""
    groups = [(g.size, g.width, g.heads) for g in coupling.groups]
    texts = [f"{size}{f'x{width}' if width > 1 else ''}{'h' * heads}" for size, width, heads in sorted(groups)]
    return " ".join(texts), [f"{p.size} {plain(p.reason)}" for p in coupling.pinned]


def plain(reason: str) -> str:
    """A reason without the names of a graph, which every exporter chooses."""
    reason = re.sub(r"it reaches the graph output '.*'", OUTPUT, reason)
    reason = re.sub(r"it is an axis of the graph input '.*'", INPUT, reason)
    return re.sub(r"^(\w+) '.*?' ", r"\1 ", reason)


def exported(name: str, exporter: str, folder: Path, dims: Sequence[int] = ()) -> Model:
    module, inputs = channel_nets.net(name)
    channel_nets.export(module, inputs, str(folder / "net.onnx"), exporter, dims)
    return load(folder / "net.onnx")


def decisions(plan: Plan, seed: int, shares: tuple[float, ...] = (0.3, 0.6, 0.9)) -> list[dict[str, np.ndarray]]:
    """Random channels of every group, each time more of them; one always stays."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, np.ndarray]] = [{} for _ in shares]
    for group in plan.coupling.groups:
        order = rng.permutation(group.size)
        for removed, share in zip(made, shares, strict=True):
            removed[group.name] = order < min(round(share * group.size), group.size - 1)
    return made


def check(plan: Plan, seed: int = 0) -> None:
    """Cut and zeroed compute the same, for several decisions; what is stored has the sizes that were asked for."""
    for removed in decisions(plan, seed):
        plan.removed = removed
        masks = shrink.kept(plan.coupling, removed)
        plan.zero(masks)
        small = plan.cut()
        plan.check(small)
        sizes = {tensor.name: list(tensor.dims) for tensor in small.proto.graph.initializer}
        wanted = {tensor.name: list(tensor.dims) for tensor in plan.coupling.model.proto.graph.initializer}
        for group in plan.coupling.groups:
            for member in group.members:
                wanted[member.name][member.axis] -= int(member.places[removed[group.name]].size)
        assert {name: sizes[name] for name in wanted if name in sizes} == {n: wanted[n] for n in wanted if n in sizes}
        assert {m.name for g in plan.coupling.groups for m in g.members if m.role != "parameter"} <= set(sizes)


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("name", channel_nets.NETS)
def test_groups_and_cuts(name: str, exporter: str, tmp_path: Path) -> None:
    model = exported(name, exporter, tmp_path)
    plan = Plan.of(model)
    assert found(plan.coupling) == EXPECTED[name]
    check(plan)
    assert verify.difference(model, plan.cut(), plan.sizes[0]) > 1e-2  # else that they agree would say nothing


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["legacy unfolded", "dynamo unfolded"])
@pytest.mark.parametrize("name", channel_nets.NETS)
def test_groups_and_cuts_with_live_norms(name: str, exporter: str, tmp_path: Path) -> None:
    plan = Plan.of(exported(name, exporter, tmp_path))
    assert found(plan.coupling) == EXPECTED[name]
    check(plan)


OPEN = [
    ("VGG", (0,), "1x3x16x16"),
    ("U-Net Resize", (0, 2, 3), "1x3x16x16"),
    ("ShuffleNet v1", (0, 2, 3), "1x3x16x16"),
    ("ShuffleNet v2", (0, 2, 3), "1x3x16x16"),
    ("SE net", (0, 2, 3), "1x3x16x16"),
    ("CRNN biLSTM", (3,), "1x1x16x24"),
    ("attention separate", (0, 1), "1x6x16"),
    ("attention merged", (0, 1), "1x6x16"),
    ("attention grouped-query", (0, 1), "1x6x16"),
    ("MultiheadAttention", (0, 1), "1x6x16"),
]


@pytest.mark.parametrize(("name", "dims", "shape"), OPEN, ids=[name for name, _, _ in OPEN])
def test_open_sizes(name: str, dims: Sequence[int], shape: str, tmp_path: Path) -> None:
    """Sizes are computed as the model runs; the check takes two choices of them."""
    model = exported(name, "legacy", tmp_path, dims)
    plan = Plan.of(model, {"x": [int(size) for size in shape.split("x")]})
    first, second = plan.sizes
    assert [i for i, (a, b) in enumerate(zip(first["x"], second["x"], strict=True)) if a != b] == list(dims)
    assert found(plan.coupling) == EXPECTED[name]
    check(plan)


def test_every_net_is_expected() -> None:
    assert list(EXPECTED) == list(channel_nets.NETS)


# Bugs seeded into rules: the literal groups or the comparison see each of them


def loose(site: Site, tie: Callable[[Site], None]) -> None:
    """An elementwise operator that does not tie its operands."""
    site.give(site.axes(0), site.null(0))


def rolled(site: Site, tie: Callable[[Site], None]) -> None:
    """Positions of the second axis are one off in each result."""
    tie(site)
    site.outputs[:] = [(a[0], np.roll(a[1], 1), *a[2:]) for a in site.outputs]


def flipped(site: Site, tie: Callable[[Site], None]) -> None:
    """The longest axis of a result runs backwards."""
    tie(site)
    for index, axes in enumerate(site.outputs):
        longest = max(range(len(axes)), key=lambda i: axes[i].size)
        site.outputs[index] = tuple(a[::-1] if i == longest else a for i, a in enumerate(axes))


def interleaved(site: Site, tie: Callable[[Site], None]) -> None:
    """Gates of a recurrent layer unit by unit instead of gate by gate."""
    tile, np.tile = np.tile, lambda axis, times: np.repeat(axis, times)
    try:
        tie(site)
    finally:
        np.tile = tile


def swapped(site: Site, tie: Callable[[Site], None]) -> None:
    """A product of two matrices that sums over the wrong axis of the second one."""
    a, b = site.axes(0), site.axes(1)
    if b[-1].size == a[-1].size:
        site.labels.tie(a[-1], b[-1])
        site.give([*a[:-1], b[-2]])
    else:
        tie(site)


BUGS = [
    ("ResNet basic", "Add", loose),
    ("ResNet bottleneck", "Add", loose),
    ("SE net", "Mul", loose),
    ("U-Net ConvTranspose", "Concat", rolled),
    ("GoogLeNet", "Concat", flipped),
    ("ShuffleNet v1", "Reshape", rolled),
    ("ShuffleNet v2", "Slice", rolled),
    ("YOLO C2f", "Slice", rolled),
    ("CRNN biLSTM", "LSTM", interleaved),
    ("GRU", "GRU", interleaved),
    ("VGG", "Flatten", flipped),
    ("SwiGLU merged", "Slice", flipped),
    ("attention merged", "Reshape", flipped),
    ("attention merged", "Split", flipped),
    ("attention separate", "MatMul", swapped),
]


@pytest.mark.parametrize(("name", "op_type", "bug"), BUGS, ids=[f"{n}-{o}-{b.__name__}" for n, o, b in BUGS])
def test_bugs_in_rules_are_seen(
    name: str, op_type: str, bug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exported(name, "legacy", tmp_path)
    assert any(node.op_type == op_type for node in model.proto.graph.node)
    rule = RULES["", op_type]
    monkeypatch.setitem(RULES, ("", op_type), Rule(lambda site: bug(site, rule.tie), rule.resize))
    plan = Plan.of(model)
    if found(plan.coupling) == EXPECTED[name]:
        with pytest.raises(PruneError, match=r"differs from the masked one|cannot be made smaller|onnxruntime"):
            check(plan)


# Small transformers with random weights

NORM, MEAN = "LayerNormalization normalises over axis", "ReduceMean reduces axis 2"
TIED = "Gather looks entries up in it"
"""An embedding that is the last layer's weight, too."""
TRANSFORMERS: dict[str, tuple[str, dict[str, int]]] = {
    # sizes of groups, each times how many there are; reasons of pinned weights, embeddings aside
    "BERT": ("2*8x32h 1*256 2*1024", {f"{NORM} 2": 4, OUTPUT: 1}),
    "DistilBERT": ("2*8x32h 2*1024", {f"{NORM} 2": 4}),
    "RoBERTa": ("2*8x32h 1*256 2*1024", {f"{NORM} 2": 4, OUTPUT: 1}),
    "GPT-2": ("2*8x96h 2*1024", {f"{NORM} 2": 4, TIED: 1}),
    "LLaMA (grouped-query)": ("2*4x64h 2*1024", {MEAN: 4, OUTPUT: 1}),
    "Qwen2 (grouped-query)": ("2*4x64h 2*1024", {MEAN: 4, OUTPUT: 1}),
    "Qwen3 (grouped-query)": ("2*4x64h 2*1024", {MEAN: 4, OUTPUT: 1}),
    "Gemma (multi-query)": (
        "2*8x32h 2*1024",
        {"Reshape holds 8 heads of 32 positions, which go as a whole": 4, MEAN: 4, TIED: 1},
    ),
    # one table of relative positions for the heads of all layers of a stack; none between the stacks
    "T5 (encoder and decoder)": ("4*8x32h 4*1024", {MEAN: 10, OUTPUT: 1}),
    "ViT": ("2*8x32h 2*1024", {f"{NORM} 2": 5, OUTPUT: 1}),
    "DeiT": ("2*8x32h 2*1024", {f"{NORM} 2": 5, OUTPUT: 1}),
    "Swin": ("2*2x32h 2*4x32h 2*256 2*512", {f"{NORM} 2": 10, OUTPUT: 1}),
    "ConvNeXt": ("1*256 1*512 2*768 1*1024", {f"{NORM} 3": 12, f"{NORM} 1": 2, OUTPUT: 1}),
    # where there is one head, its queries and keys, and its values, lose positions of their own
    "SegFormer": ("1*2x32h 1*4x32h 1*8x32h 2*32 1*128 6*256 1*512 1*1024", {f"{NORM} 2": 15, OUTPUT: 1}),
    "Whisper (encoder and decoder)": ("6*8x32h 1*256 4*1024", {f"{NORM} 2": 11, TIED: 1}),
    "Wav2Vec2": ("2*8x32h 1*64 2*1024", {f"{NORM} 2": 6, OUTPUT: 1}),
    "CLIP (text and image)": ("4*8x32h 1*128 4*1024", {f"{NORM} 2": 9}),
    # the first attention of the decoder sees no input: the exporter computes it
    "DETR": ("5*4x32h 2*16 2*32 5*64 5*128 1*256 5*512", {f"{NORM} 2": 10, OUTPUT: 2}),
    "ResNet": ("2*16 2*32 5*64 3*128 1*256 1*512", {OUTPUT: 1}),
    "RegNet": ("2*16 1*32 2*32x2 2*32x4 4*32x8 2*32x16 4*64 1*128 1*256 1*512", {OUTPUT: 1}),
    "MobileViT": (
        "2*4x24h 4*4x32h 3*4x40h 1*16 1*32 2*64 4*96 5*128 4*160 2*192 7*256 3*320 1*384 1*512 1*640",
        {f"{NORM} 2": 21, OUTPUT: 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    import _architectures

    chosen = next(a for a in _architectures.transformers() if a.name == name)
    chosen.write(tmp_path / "net.onnx")
    plan = Plan.of(load(tmp_path / "net.onnx"))
    groups, _ = found(plan.coupling)
    pinned = Counter(plain(p.reason) for p in plan.coupling.pinned if p.op_type not in {"Embedding", "Gather"})
    expected, reasons = TRANSFORMERS[name]
    assert " ".join(f"{count}*{size}" for size, count in Counter(groups.split()).items()) == expected
    assert dict(pinned) == reasons
    check(plan)
