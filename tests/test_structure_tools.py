"""Models made by onnxruntime's own tools: optimised, fused, quantised, of 16 bits. They shrink as the plain ones do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import parse
from onnx import numpy_helper
from structure_oracle import Net, choose, count, found

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.graph.model import load, open_proto
from onnxprune.runtime import session
from onnxprune.structure import shrink, verify
from onnxprune.structure.plan import Plan

Feeds = list[dict[str, np.ndarray]]
RNG = np.random.default_rng(3)

CNN = Net(
    "cnn",
    "(float[N,3,16,16] x) => (float[N,10] y) { a0 = Conv<pads = [1, 1, 1, 1]>(x, stem)"
    " a1 = BatchNormalization(a0, s1, c1, m1, v1) a = Relu(a1)"
    " b0 = Conv<pads = [1, 1, 1, 1]>(a, wide) b1 = BatchNormalization(b0, s2, c2, m2, v2) b = Relu(b1)"
    " d0 = Conv<pads = [1, 1, 1, 1]>(b, narrow) d1 = BatchNormalization(d0, s3, c3, m3, v3) d = Relu(d1) e = Add(d, a)"
    " f0 = Conv<pads = [1, 1, 1, 1], group = 16>(e, deep) f1 = BatchNormalization(f0, s4, c4, m4, v4) f = Relu(f1)"
    " g0 = Conv(f, point, pc) g = Relu(g0) p = GlobalAveragePool(g) q = Flatten(p) y = Gemm<transB = 1>(q, fc, fb) }",
    {
        **{"stem": (16, 3, 3, 3), "wide": (32, 16, 3, 3), "narrow": (16, 32, 3, 3), "deep": (16, 1, 3, 3)},
        **{"point": (24, 16, 1, 1), "pc": (24,), "fc": (10, 24), "fb": (10,)},
        **{f"{letter}{i}": (size,) for i, size in ((1, 16), (2, 32), (3, 16), (4, 16)) for letter in "scmv"},
    },
    ("stem 16", "wide 32", "point 24"),
    opset=17,
)

LLAMA = Net(
    "llama",
    "(float[1,5,32] x, float[1,2,4,16] pk, float[1,2,4,16] pv) => (float[1,5,32] y, float[1,2,9,16] ok,"
    " float[1,2,9,16] ov) {"
    " n = SimplifiedLayerNormalization<axis = -1>(x, g1) q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)"
    " a, ok, ov = com.microsoft.GroupQueryAttention<num_heads = 8, kv_num_heads = 2, do_rotary = 1>"
    "(q, k, v, pk, pv, last, total, cos, sin) o = MatMul(a, wo)"
    " r, d1, d2, h = com.microsoft.SkipSimplifiedLayerNormalization(x, o, g2) gate = MatMul(r, wg) up = MatMul(r, wu)"
    " s = com.microsoft.QuickGelu<alpha = 1.0>(gate) m = Mul(s, up) w = MatMul(m, wd) y = Add(w, h) }",
    {
        **{"g1": (32,), "g2": (32,), "wq": (32, 128), "wk": (32, 32), "wv": (32, 32), "wo": (128, 32)},
        **{"wg": (32, 48), "wu": (32, 48), "wd": (48, 32), "cos": (16, 8), "sin": (16, 8)},
        **{"last": np.int32([8]), "total": np.array(9, np.int32)},
    },
    ("wq 4x32 heads", "wg 48"),
)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """These tools warn and log as they go."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def scaled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights such that values stay about as large from layer to layer."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1 and tensor.name not in {"cos", "sin"}:
            inputs = array[0].size if array.ndim > 2 or tensor.name == "fc" else array.shape[0]
            array = (array / np.sqrt(inputs)).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cnn") / "plain.onnx"
    onnx.save(scaled(CNN.model()), path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers and four heads, whose weights are as far from 0 as trained ones."""
    import torch
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=96, max_position_embeddings=256, attn_implementation="eager")
    torch.manual_seed(0)
    net = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn_like(value) * (0.3 if value.ndim == 1 else value.shape[-1] ** -0.5))
        for module in net.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)

    class Net_(torch.nn.Module):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    path = tmp_path_factory.mktemp("bert") / "plain.onnx"
    ids, names = torch.ones(2, 8, dtype=torch.long), ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Net_().eval(), (ids, ids, torch.zeros_like(ids)), path, input_names=names, output_names=["y"],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    return path


# ---------------------------------------------------------------- the tools

Tool = Callable[[Path, Path], None]


def optimised(level: str) -> Tool:
    def make(source: Path, target: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return make


def fused(heads: bool = False, half: bool = False) -> Tool:
    """BERT's own fusion: Attention or MultiHeadAttention, SkipLayerNormalization, EmbedLayerNormalization, BiasGelu."""

    def make(source: Path, target: Path) -> None:
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        options = FusionOptions("bert")
        options.use_multi_head_attention = heads
        model = optimizer.optimize_model(
            str(source), "bert", num_heads=4, hidden_size=64, optimization_options=options, opt_level=0
        )
        if half:
            model.convert_float_to_float16()
        model.save_model_to_file(str(target))

    return make


def half(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source)), target)


def prepared(source: Path, target: Path) -> None:
    """What quantisation wants: BatchNorms folded, shapes inferred."""
    from onnxruntime.quantization.preprocess import quant_pre_process

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True, skip_optimization="bert" in str(source))


def ranged(per_channel: bool, before: Tool = prepared) -> Tool:
    def make(source: Path, target: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        ready = target.with_name("ready.onnx")
        before(source, ready)
        kind = QuantType.QInt8 if per_channel else QuantType.QUInt8
        quantize_dynamic(
            ready, target, per_channel=per_channel, weight_type=kind, extra_options={"DefaultTensorType": 1}
        )

    return make


def calibrated(form: str, per_channel: bool) -> Tool:
    def make(source: Path, target: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                ids = {name: np.ones((2, 8), np.int64) for name in ("attention_mask", "token_type_ids")}
                words = [{"input_ids": RNG.integers(0, 100, (2, 8)), **ids} for _ in range(2)]
                pictures = [{"x": RNG.standard_normal((2, 3, 16, 16)).astype(np.float32)} for _ in range(3)]
                self.feeds = iter(words if "bert" in str(source) else pictures)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.feeds, None)

        ready = target.with_name("ready.onnx")
        prepared(source, ready)
        quantize_static(
            ready, target, Reader(), quant_format=QuantFormat[form], per_channel=per_channel,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8 if per_channel else QuantType.QUInt8,
        )  # fmt: skip

    return make


# ---------------------------------------------------------------- what is found in what they make


def shrinks(path: Path) -> tuple[Plan, list[int]]:
    """Check that a model, half of whose channels or other ones go, computes what the masked one does."""
    plan = Plan.of(load(path))
    before = count(plan.coupling.model.proto)
    choose(plan, 1)
    plan.zero(shrink.kept(plan.coupling, plan.removed))
    small = plan.cut()
    plan.check(small)
    assert count(small.proto) < before
    result = onnxprune.prune(path, [{"sparsity": 0.5, "op_types": "default", "pattern": "channel"}], keep_shape=False)
    assert all(row.kept <= -(-row.size // 2) for row in result.report.groups)
    return plan, [group.size for group in plan.coupling.groups]


CNN_TOOLS: dict[str, Tool] = {
    "basic": optimised("BASIC"),
    "extended": optimised("EXTENDED"),
    "16 bits": half,
    "ranged": ranged(False),
    "ranged per channel": ranged(True),
    "QDQ": calibrated("QDQ", False),
    "QDQ per channel": calibrated("QDQ", True),
    "operators": calibrated("QOperator", False),
    "operators per channel": calibrated("QOperator", True),
}


@pytest.mark.parametrize("tool", CNN_TOOLS)
def test_cnn(cnn: Path, tmp_path: Path, tool: str) -> None:
    target = tmp_path / "made.onnx"
    CNN_TOOLS[tool](cnn, target)
    plan, sizes = shrinks(target)
    assert sizes == [16, 32, 24]
    assert [(pinned.size, pinned.reason) for pinned in plan.coupling.pinned] == [
        (10, "it reaches the graph output 'y'")
    ]


def test_cnn_in_blocks(cnn: Path, tmp_path: Path) -> None:
    """At the highest level convolutions are laid out for the machine: all stays, and the reason is said."""
    target = tmp_path / "made.onnx"
    optimised("ALL")(cnn, target)
    if not any(node.domain == "com.microsoft.nchwc" for node in onnx.load(target).graph.node):
        pytest.skip("this machine has no kernels for blocks of channels")
    explained = onnxprune.structure.explain(target)
    assert explained.groups == ()
    assert all("keeps channels in blocks made for one machine" in pinned.reason for pinned in explained.pinned)


BERT_TOOLS: dict[str, Tool] = {
    "extended": optimised("EXTENDED"),
    "attention": fused(),
    "heads": fused(heads=True),
    "16 bits": fused(half=True),
    "attention, ranged": ranged(False, fused()),
    "attention, ranged per channel": ranged(True, fused()),
    "ranged": ranged(False),
    "QDQ per channel": calibrated("QDQ", True),
    "operators": calibrated("QOperator", False),
}
SLOW = {"ranged", "QDQ per channel", "operators", "heads", "attention, ranged per channel"}


@pytest.mark.parametrize("tool", [pytest.param(t, marks=pytest.mark.slow) if t in SLOW else t for t in BERT_TOOLS])
def test_bert(bert: Path, tmp_path: Path, tool: str) -> None:
    """Heads and inner channels of both layers; what meets in the residual sum is normalised, and stays."""
    target = tmp_path / "made.onnx"
    BERT_TOOLS[tool](bert, target)
    plan, sizes = shrinks(target)
    assert sizes == [4, 96, 4, 96]
    assert [group.heads for group in plan.coupling.groups] == [True, False, True, False]
    kept = [pinned for pinned in plan.coupling.pinned if pinned.op_type != "Gather" and pinned.size == 64]
    assert len(kept) == 4
    assert all("normalises over" in pinned.reason for pinned in kept)


@pytest.mark.parametrize("bits", [32, 16])
def test_llama_block(tmp_path: Path, bits: int) -> None:
    """With caches as inputs and outputs, keys and values stay, and each loses as many of its queries."""
    path = tmp_path / "llama.onnx"
    onnx.save(scaled(LLAMA.model()), path)
    if bits == 16:
        half(path, path)
    plan, _ = shrinks(path)
    assert found(plan) == LLAMA.groups
    reasons = {pinned.name: pinned.reason for pinned in plan.coupling.pinned}
    assert reasons["wk"] == reasons["wv"] == "it is an axis of the graph input 'pk'"
    assert reasons["wo"] == "it is an axis of the graph input 'x'"


@pytest.mark.parametrize("symmetric", [True, False])
def test_llama_block_of_4_bits(tmp_path: Path, symmetric: bool) -> None:
    """Weights before a DequantizeLinear are weights; packed in a MatMulNBits, no entry can be scored, and all stays."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    for form, groups in (("QDQ", ("wq_DQ_Q4 4x32 heads", "wg_DQ_Q4 3x16")), ("QOperator", ())):
        model = scaled(LLAMA.model())
        quantizer = MatMulNBitsQuantizer(model, 4, 16, is_symmetric=symmetric, quant_format=QuantFormat[form])
        quantizer.process()
        path = tmp_path / f"{form}.onnx"
        onnx.save(quantizer.model.model, path)
        assert found(Plan.of(load(path))) == groups
        if groups:
            shrinks(path)


# ---------------------------------------------------------------- what rounding can explain


@pytest.mark.parametrize("tool", ["16 bits", "QDQ", "operators per channel", "ranged"])
def test_faults_in_coarse_models(cnn: Path, tmp_path: Path, tool: str) -> None:
    """What is allowed is far from what channels of one tensor in a wrong order do."""
    target = tmp_path / "made.onnx"
    CNN_TOOLS[tool](cnn, target)
    plan = Plan.of(load(target))
    choose(plan, 2)
    plan.zero(shrink.kept(plan.coupling, plan.removed))
    small = plan.cut()
    plan.check(small)
    allowed = verify.tolerance(plan.coupling.model, plan.sizes[0])
    assert verify.TOLERANCE <= allowed < 0.05
    member = plan.coupling.groups[-1].members[0]
    proto = onnx.ModelProto.FromString(small.proto.SerializeToString())
    tensor = next(t for t in proto.graph.initializer if t.name == member.name)
    swapped = np.roll(numpy_helper.to_array(tensor), 1, member.axis)
    tensor.CopyFrom(numpy_helper.from_array(swapped, tensor.name))
    with pytest.raises(PruneError, match="differs from the masked one"):
        plan.check(open_proto(proto, None, None))


def test_plain_floats_are_held_to_a_fixed_tolerance(cnn: Path) -> None:
    plan = Plan.of(load(cnn))
    assert verify.tolerance(plan.coupling.model, plan.sizes[0]) == verify.TOLERANCE == 1e-4


def test_what_onnxruntime_rounds_is_not_held_against_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a DequantizeLinear of a weight it multiplies in 8 bits, in blocks of rows that a cut moves."""
    rng = np.random.default_rng(0)
    model = parse(
        "(float[N, 6] x) => (float[N, 3] y) { h = MatMul(x, w1) w = DequantizeLinear<axis = 0>(w2, s) z = MatMul(h, w)"
        " r = Elu(z) y = MatMul(r, w3) }",
        w1=rng.normal(size=(6, 96)).astype(np.float32),
        w2=rng.integers(-100, 100, (96, 16)).astype(np.int8),
        s=np.float32(0.01),
        w3=rng.normal(size=(16, 3)).astype(np.float32),
    )
    half = [{"sparsity": 0.5, "op_types": "default", "pattern": "channel"}]
    assert [row.kept for row in onnxprune.prune(model, half, align=1).report.groups] == [48, 8]
    real = session.open_session
    monkeypatch.setattr(session, "open_session", lambda *given, exact, **named: real(*given, **named))
    with pytest.raises(PruneError, match="differs from the masked one"):
        onnxprune.prune(model, half, align=1)


CANCELLING = Net(
    "a small difference of large numbers",
    """(float[16,48] x) => (float[16,8] y) {
        h = MatMul(x, w1) r = Relu(h) k = MatMul(r, w2) a = Add(k, large) s = Sub(a, large2) y = MatMul(s, w3)
    }""",
    {
        **{"w1": (48, 1024), "w2": (1024, 64), "w3": (64, 8)},
        **{name: np.array(300, np.float32) for name in ("large", "large2")},
    },
    (),
)


def test_floats_that_cancel_are_held_to_their_own_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a right cut is off by more than the bar, it passes; with two rows in the wrong order it does not."""
    monkeypatch.setattr(verify, "TOLERANCE", 1e-8)
    plan = Plan.of(load(CANCELLING.model()))
    choose(plan, 0)
    plan.zero(shrink.kept(plan.coupling, plan.removed))
    small = plan.cut()
    apart, allowed = plan.check(small), verify.tolerance(plan.coupling.model, plan.sizes[0])
    assert verify.TOLERANCE < apart < allowed <= verify.LIMIT
    proto = onnx.ModelProto.FromString(small.proto.SerializeToString())
    tensor = next(t for t in proto.graph.initializer if t.name == "w3")
    rows = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.concatenate([rows[1:2], rows[:1], rows[2:]]), tensor.name))
    with pytest.raises(PruneError, match="differs from the masked one"):
        plan.check(open_proto(proto, None, None))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.uint8])
def test_which_models_are_coarse(dtype: type) -> None:
    """Those that store anything of 8 or 16 bits: what rounding can explain is more there."""
    model = parse("(float[2,3] x) => (float[2,4] y) { y = MatMul(x, w) }", w=np.ones((3, 4), np.float32))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, dtype), "also"))
    assert verify._is_coarse(load(model)) == (np.dtype(dtype).itemsize < 4)
