"""What inspection counts: zeros against numpy, MACs against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.inspection import Inspection, inspect

MODELS = Path(__file__).parents[1] / "models"
HEAD = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1, "local" : 1]>\n'


def net(text: str, **arrays: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text, arrays added as initializers."""
    model = parser.parse_model(HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def macs(inspection: Inspection) -> dict[str, int | None]:
    return {weight.name: weight.macs for weight in inspection.weights}


CASES = {
    "conv with stride and padding: 16x16 positions, kernel 3x3, 3 inputs, 8 outputs": (
        "g (float[1,3,32,32] x) => (y) {y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w)}",
        {"w": ones(8, 3, 3, 3)},
        16 * 16 * 8 * 3 * 3 * 3,
    ),
    "grouped conv: every output sees 2 of 8 inputs": (
        "g (float[2,8,10,10] x) => (y) {y = Conv<group=4>(x, w)}",
        {"w": ones(12, 2, 3, 3)},
        2 * 8 * 8 * 12 * 2 * 9,
    ),
    "conv of one dim": ("g (float[1,4,20] x) => (y) {y = Conv(x, w)}", {"w": ones(6, 4, 5)}, 16 * 6 * 4 * 5),
    "transposed conv: each of 5x7 input positions meets the whole kernel": (
        "g (float[1,4,5,7] x) => (y) {y = ConvTranspose<strides=[2,2]>(x, w)}",
        {"w": ones(4, 6, 3, 3)},
        5 * 7 * 4 * 6 * 9,
    ),
    "matmul, two batch axes": (
        "g (float[2,3,5,16] x) => (y) {y = MatMul(x, w)}",
        {"w": ones(16, 10)},
        2 * 3 * 5 * 16 * 10,
    ),
    "matmul of vectors": ("g (float[16] x) => (y) {y = MatMul(x, w)}", {"w": ones(16)}, 16),
    "matmul, weight on the left": ("g (float[2,16,5] x) => (y) {y = MatMul(w, x)}", {"w": ones(7, 16)}, 2 * 7 * 16 * 5),
    "matmul, a weight for each batch": (
        "g (float[3,5,16] x) => (y) {y = MatMul(x, w)}",
        {"w": ones(3, 16, 10)},
        3 * 5 * 16 * 10,
    ),
    "matmul, the data repeated for each weight": (
        "g (float[5,16] x) => (y) {y = MatMul(x, w)}",
        {"w": ones(3, 16, 10)},
        3 * 5 * 16 * 10,
    ),
    "matmul, a stack of one weight": (
        "g (float[4,5,16] x) => (y) {y = MatMul(x, w)}",
        {"w": ones(1, 16, 10)},
        4 * 5 * 16 * 10,
    ),
    "gemm, transposed": ("g (float[4,16] x) => (y) {y = Gemm<transB=1>(x, w)}", {"w": ones(10, 16)}, 4 * 16 * 10),
    "gemm, data transposed": ("g (float[16,4] x) => (y) {y = Gemm<transA=1>(x, w)}", {"w": ones(16, 10)}, 4 * 16 * 10),
    "gemm, weight on the left": ("g (float[16,4] x) => (y) {y = Gemm(w, x)}", {"w": ones(10, 16)}, 4 * 16 * 10),
    "fused conv, then a conv whose input only it tells": (
        """g (float[1,3,8,8] x) => (y) {
            t = com.microsoft.FusedConv<activation="Relu">(x, w)
            y = Conv(t, v)
        }""",
        {"w": ones(4, 3, 3, 3), "v": ones(5, 4, 3, 3)},
        {"w": 36 * 4 * 27, "v": 16 * 5 * 36},
    ),
    "attention's merged projection": (
        "g (float[2,7,16] x) => (y) {y = com.microsoft.Attention<num_heads=2>(x, w, b)}",
        {"w": ones(16, 48), "b": ones(48)},
        2 * 7 * 16 * 48,
    ),
    "lstm: 9 steps, batch 2": (
        "g (float[9,2,5] x) => (y) {y = LSTM<hidden_size=4>(x, w, r)}",
        {"w": ones(1, 16, 5), "r": ones(1, 16, 4)},
        {"w": 9 * 2 * 16 * 5, "r": 9 * 2 * 16 * 4},
    ),
    "gru in both directions": (
        'g (float[9,2,5] x) => (y) {y = GRU<hidden_size=4, direction="bidirectional">(x, w, r)}',
        {"w": ones(2, 12, 5), "r": ones(2, 12, 4)},
        {"w": 9 * 2 * 2 * 12 * 5, "r": 9 * 2 * 2 * 12 * 4},
    ),
    "embedding": ("g (int64[1,6] i) => (y) {y = Gather(w, i)}", {"w": ones(50, 8)}, 0),
    "a shared weight counts once for every use": (
        "g (float[4,8] x) => (y) {t = MatMul(x, w) y = MatMul(t, w)}",
        {"w": ones(8, 8)},
        2 * 4 * 64,
    ),
    "two weights stacked share the operand's": (
        "g (float[4,8] x) => (y) {c = Concat<axis=1>(a, b) y = MatMul(x, c)}",
        {"a": ones(8, 3), "b": ones(8, 5)},
        {"a": 4 * 8 * 3, "b": 4 * 8 * 5},
    ),
    "only the rows that are read count": (
        "g (float[4,8] x) => (y) {c = Slice(w, from, to) y = MatMul(x, c)}",
        {"w": ones(20, 5), "from": np.array([4]), "to": np.array([12])},
        4 * 8 * 5,
    ),
    "deformable conv": (
        "g (float[1,2,3,3] x, float[1,8,2,2] o) => (float[1,3,2,2] y) {y = DeformConv<kernel_shape=[2, 2]>(x, w, o)}",
        {"w": ones(3, 2, 2, 2)},
        4 * 24,
    ),
    "einsum": (
        'g (float[5,16] x) => (y) {y = Einsum<equation="bi,io->bo">(x, w)}',
        {"w": ones(16, 10)},
        5 * 160,
    ),
    "einsum to heads": (
        'g (float[2,3,4] x) => (y) {y = Einsum<equation="abc,cde->abde">(x, w)}',
        {"w": ones(4, 5, 6)},
        6 * 120,
    ),
    "einsum per head, the weight first": (
        'g (float[2,3,4] x) => (y) {y = Einsum<equation="hoi,bhi->bho">(w, x)}',
        {"w": ones(3, 5, 4)},
        2 * 60,
    ),
    "quantised conv": (
        """g (uint8[1,3,8,8] x) => (y) {
            y = QLinearConv(x, one, zero, w, one, mid, one, zero)
        }""",
        {
            "w": np.full((4, 3, 3, 3), 7, np.int8),
            "one": np.float32(1),
            "zero": np.uint8(0),
            "mid": np.int8(0),
        },
        36 * 4 * 27,
    ),
    "quantised matmul": (
        "g (uint8[5,16] x) => (y) {y = QLinearMatMul(x, one, zero, w, one, zero, one, zero)}",
        {"w": np.full((16, 10), 7, np.uint8), "one": np.float32(1), "zero": np.uint8(0)},
        5 * 160,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_macs(case: str) -> None:
    text, arrays, expected = CASES[case]
    found = macs(inspect(net(text, **arrays)))
    assert found == (expected if isinstance(expected, dict) else {"w": expected})


def test_dynamic_dims_are_those_given_or_the_noted_default() -> None:
    model = net("g (float[N,8,H,H] x) => (y) {y = Conv(x, w)}", w=ones(4, 8, 1, 1))
    given = inspect(model, {"x": (2, 8, 5, 5)})
    assert macs(given) == {"w": 2 * 25 * 32}
    assert given.inputs[0].shape == ("N", 8, "H", "H")
    assert given.inputs[0].taken == (2, 8, 5, 5)
    assert given.outputs[0].taken == (2, 4, 5, 5)
    assert given.notes == ()
    assumed = inspect(model)
    assert macs(assumed) == {"w": 224 * 224 * 32}
    assert "1x8x224x224" in assumed.notes[0]


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = net("g (float[N,8] x) => (y) {y = MatMul(x, w)}", w=ones(8, 4))
    with pytest.raises(PruneError, match="'z'"):
        inspect(model, {"z": (1, 8)})
    with pytest.raises(PruneError, match="1x9"):
        inspect(model, {"x": (1, 9)})


SHAPE_ARITHMETIC = """g (float[N,4,H,W] x) => (y) {
    s = Shape(x)
    h = Gather(s, two)
    half = Div(h, two)
    rows = Range(zero, half, step)
    c = Shape(rows)
    z = Cast<to=1>(s)
    u = Cast<to=7>(z)
    n = Slice(u, first, step1)
    target = Concat<axis=0>(n, c, rest)
    t = Reshape(x, target)
    y = MatMul(t, w)
}"""


def test_shapes_computed_at_run_time_are_followed() -> None:
    model = net(
        SHAPE_ARITHMETIC,
        w=ones(64, 6),
        two=np.int64(2),
        zero=np.int64(0),
        step=np.int64(1),
        first=np.array([0]),
        step1=np.array([1]),
        rest=np.array([-1]),
    )
    found = inspect(model, {"x": (2, 4, 8, 8)})  # reshaped to 2 x 4 x 64
    assert macs(found) == {"w": 2 * 4 * 64 * 6}
    assert found.outputs[0].taken == (2, 4, 6)


def test_declared_shapes_are_not_believed() -> None:
    text = """g (float[1,3,8,8] x) => (float[9,9,9,9] y) <float[7,4,3,3] t> {
        t = Conv(x, w)
        y = Conv(t, v)
    }"""
    found = inspect(net(text, w=ones(4, 3, 3, 3), v=ones(5, 4, 3, 3)))
    assert macs(found) == {"w": 36 * 4 * 27, "v": 16 * 5 * 36}
    assert found.outputs[0].shape == (9, 9, 9, 9)
    assert found.outputs[0].taken == (1, 5, 4, 4)


def test_a_loops_body_has_no_macs_and_says_why() -> None:
    text = """g (float[2,8] x, int64 trips) => (y) {
        go = Constant<value = bool {1}>()
        y = Loop(trips, go, x)<body = b (int64 i, bool c, float[2,8] s) => (bool c2, float[2,8] s2) {
            c2 = Identity(c)
            s2 = MatMul(s, w)
        }>
    }"""
    found = inspect(net(text, w=ones(8, 8)))
    assert macs(found) == {"w": None}
    assert "number of iterations" in found.weights[0].macs_unknown
    assert found.macs == 0
    assert not found.macs_complete


def test_both_branches_count_and_a_note_says_so() -> None:
    text = """g (float[2,8] x, bool c) => (y) {
        y = If(c)<
            then_branch = t () => (float[2,4] a) {a = MatMul(x, w)},
            else_branch = e () => (float[2,4] b) {b = MatMul(x, v)}
        >
    }"""
    found = inspect(net(text, w=ones(8, 4), v=ones(8, 4)))
    assert macs(found) == {"w": 2 * 32, "v": 2 * 32}
    assert any("every branch" in note for note in found.notes)


def test_functions_count_for_each_call() -> None:
    text = """g (float[2,8] x) => (y) {
        t = local.twice(x, w)
        y = local.twice(t, v)
    }
    <domain: "local", opset_import: ["" : 18]>
    twice (a, m) => (d) {
        b = MatMul(a, m)
        d = MatMul(b, m)
    }"""
    found = inspect(net(text, w=ones(8, 8), v=ones(8, 8)))
    assert macs(found) == {"w": 2 * 2 * 64, "v": 2 * 2 * 64}


def test_an_operator_nobody_knows_leaves_macs_open() -> None:
    text = "g (float[2,8] x) => (y) {t = local.Strange(x) y = MatMul(t, w)}"
    found = inspect(net(text, w=ones(8, 4)))
    assert macs(found) == {"w": None}
    assert "'t'" in found.weights[0].macs_unknown


@pytest.mark.parametrize("seed", range(3))
def test_zeros_and_parameters_against_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((16, 10)).astype(np.float32) * (rng.random((16, 10)) < 0.3)
    w[0, 0] = -0.0
    b = rng.standard_normal(10).astype(np.float32) * (rng.random(10) < 0.5)
    e = rng.standard_normal((50, 8)).astype(np.float16)
    text = """g (float[4,16] x, int64[3] i) => (y, z) {
        y = Gemm(x, w, b)
        e2 = Transpose<perm=[1,0]>(e)
        z = Gather<axis=1>(e2, i)
    }"""
    model = net(text, w=w, b=b, e=e, unread=np.arange(5))
    found = inspect(model)
    by_name = {weight.name: weight for weight in found.weights}
    assert by_name["w"].zeros == int((w == 0).sum())
    assert by_name["w"].sparsity == pytest.approx(float((w == 0).mean()))
    assert found.zeros == int((w == 0).sum()) + int((e == 0).sum())
    assert found.size == w.size + e.size
    assert found.parameters == w.size + b.size + e.size
    assert found.nonzero == np.count_nonzero(w) + np.count_nonzero(b) + np.count_nonzero(e)
    assert by_name["w"].shape == (16, 10)
    assert by_name["w"].role_shape == (10, 16)
    assert by_name["w"].dtype == "float32"
    assert by_name["e"].op_types == ("Embedding",)


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_zeros_are_zero_points(axis: int) -> None:
    rng = np.random.default_rng(7)
    q = rng.integers(-3, 4, (8, 6), dtype=np.int8)
    points = rng.integers(-3, 4, (8, 6)[axis], dtype=np.int8)
    scales = np.full(points.shape, 0.5, np.float32)
    text = f"g (float[4,8] x) => (y) {{d = DequantizeLinear<axis={axis}>(q, s, p) y = MatMul(x, d)}}"
    found = inspect(net(text, q=q, s=scales, p=points))
    (weight,) = found.weights
    seen = q.astype(int) - (points[:, None] if axis == 0 else points)
    assert weight.dtype == "int8"
    assert weight.zeros == int((seen == 0).sum())
    assert weight.macs == 4 * 48
    assert found.parameters == q.size + 2 * points.size
    assert found.nonzero == found.parameters - int((seen == 0).sum()) - int((points == 0).sum())


def test_weights_in_constant_nodes_and_branches_are_parameters() -> None:
    text = """g (float[2,3] x, bool c) => (y) {
        w = Constant<value = float[3,2] {1, 0, 3, 4, 0, 6}>()
        t = MatMul(x, w)
        y = If(c)<
            then_branch = t () => (float[2,2] a) {
                v = Constant<value = float[2,2] {1, 2, 3, 0}>()
                a = MatMul(t, v)
            },
            else_branch = e () => (float[2,2] b) {b = Identity(t)}
        >
    }"""
    found = inspect(net(text))
    assert (found.parameters, found.nonzero, found.zeros) == (10, 7, 3)


def test_left_alone_has_its_reason() -> None:
    found = inspect(net("g (float[4,8] x) => (y) {e = Exp(w) y = MatMul(x, e)}", w=ones(8, 8)))
    assert found.weights == ()
    assert "Exp" in found.skipped[0].reason


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("g (float[4,8] x) => (y) {y = MatMul(x, w)}", (9, 3)),
        ("g (float[4,5,9] x) => (y) {y = MatMul(x, w)}", (3, 9, 3)),
        ("g (float[4] x) => (y) {y = ConvTranspose(x, w)}", (4, 2, 3, 3)),
        ("g (float[4] x) => (y) {y = Conv(x, w)}", (4, 2, 3, 3)),
    ],
)
def test_a_broken_graph_still_shows_its_weights(text: str, shape: tuple[int, ...]) -> None:
    found = inspect(net(text, w=ones(*shape)))
    assert macs(found) == {"w": None}
    assert found.weights[0].macs_unknown
    assert found.size == np.prod(shape)


def test_files_and_their_external_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2, 32, 40)).astype(np.float32)
    text = "g (float[2,2,20,16] x) => (y) {t = Reshape(x, target) y = MatMul(t, w)}"
    model = net(text, w=w, target=np.array([2, 20, -1]))
    inline, external = tmp_path / "inline.onnx", tmp_path / "external.onnx"
    onnx.save(model, inline)
    onnx.save(model, external, save_as_external_data=True, location="data.bin", size_threshold=0)
    one, two = inspect(inline), inspect(external)
    assert one.file_bytes == inline.stat().st_size
    assert two.file_bytes == external.stat().st_size + (tmp_path / "data.bin").stat().st_size
    assert macs(one) == macs(two) == {"w": 2 * 20 * 32 * 40}
    before, after = one.to_dict(), two.to_dict()
    assert {k: v for k, v in before.items() if k not in ("path", "file_bytes")} == {
        k: v for k, v in after.items() if k not in ("path", "file_bytes")
    }


def test_the_model_is_not_changed() -> None:
    model = net("g (float[N,2000] x) => (float[3,3] y) {y = MatMul(x, w)}", w=ones(2000, 4))
    before = model.SerializeToString()
    inspect(model, {"x": (3, 2000)})
    assert model.SerializeToString() == before


def test_lenet5_by_hand() -> None:
    found = inspect(MODELS / "lenet5.onnx")
    assert found.path == str(MODELS / "lenet5.onnx")
    assert macs(found) == {
        "conv1.weight": 24 * 24 * 20 * 25,
        "conv2.weight": 8 * 8 * 50 * 20 * 25,
        "fc1.weight": 500 * 800,
        "fc2.weight": 10 * 500,
    }
    assert (found.parameters, found.size, found.macs) == (431_080, 430_500, 2_293_000)
    assert found.macs_complete


def test_after_pruning_the_counts_are_the_results(tmp_path: Path) -> None:
    dense = inspect(MODELS / "lenet5.onnx")
    config = [{"sparsity": 0.7, "op_types": "default"}]
    result = onnxprune.prune(MODELS / "lenet5.onnx", config, output=tmp_path / "p.onnx")
    found = inspect(tmp_path / "p.onnx")
    assert [weight.zeros for weight in found.weights] == [row.zeros for row in result.report.rows]
    assert found.sparsity == result.sparsity
    assert dense.nonzero - found.nonzero == result.report.zeros - dense.zeros
    assert found.macs == dense.macs


def test_onnxruntime_is_not_needed() -> None:
    code = "import sys, onnxprune; onnxprune.inspect(sys.argv[1]); assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(MODELS / "lenet5.onnx")], check=True)
