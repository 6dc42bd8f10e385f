"""What must hold for every graph, tried on random ones: right, or refused with a PruneError that says why."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import model_files
import numpy as np
import onnx
import pytest
import structure_oracle
from graphs import Graph, graphs
from hypothesis import HealthCheck, Phase, given, settings
from nets import session, tensors
from onnx import numpy_helper
from structure_oracle import Net, ints
from test_lowering import Always

import onnxprune
from onnxprune import PruneError
from onnxprune.algorithms import select
from onnxprune.graph import model as loading
from onnxprune.graph.model import load
from onnxprune.lowering.lower import lowered
from onnxprune.structure.plan import Plan

SPARSITIES = (0.5, 0.3, 0.9, 1.0)


def seed_of(graph: Graph) -> int:
    """A number that varies from graph to graph."""
    return len(graph.model.graph.node) + sum(len(name) for name in graph.steps)


def pruned(model: onnx.ModelProto | Path, **entry: object) -> onnxprune.api.Result | None:
    """The result; None where there is nothing to prune."""
    try:
        options = {"keep_shape": True} if entry.pop("keep_shape", False) else {}
        return onnxprune.prune(model, [{"sparsity": 0.5, **entry}], **options)
    except PruneError as error:
        if "matches no weight" not in str(error) and "no weight" not in str(error):
            raise
        return None


def run(model: onnx.ModelProto, graph: Graph) -> list[np.ndarray]:
    return list(session(model).run(None, graph.feed))


def apart(model: onnx.ModelProto, other: onnx.ModelProto, graph: Graph) -> float:
    """The largest difference of outputs, as a share of the output's scale; what is not finite must be alike."""
    worst = 0.0
    for a, b in zip(run(model, graph), run(other, graph), strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), "not finite in other places"
        finite = np.isfinite(a)
        a, b = a[finite], b[finite]
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)) / (float(np.abs(a).max(initial=0.0)) or 1.0))
    return worst


def tolerance(graph: Graph) -> float:
    return {"float16": 2e-2, "float64": 1e-9}.get(graph.steps[0], 2e-3)


# ------------------------------------------------------------------ the properties


def exact(graph: Graph) -> None:
    """Level pruning zeroes int(n * s) entries of each weight, and touches nothing else."""
    sparsity = SPARSITIES[seed_of(graph) % len(SPARSITIES)]
    result = pruned(graph.model, sparsity=sparsity)
    if result is None:
        return
    before, after = dict(tensors(graph.model)), dict(tensors(result.to_proto()))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        was, now = numpy_helper.to_array(tensor), numpy_helper.to_array(after[name])
        mask = result.masks[name] if name in result.masks else np.ones(was.shape, np.bool_)
        assert was[mask].tobytes() == now[mask].tobytes(), name
    for row in result.report.rows:
        assert np.count_nonzero(~result.masks[row.name]) == int(row.size * sparsity), row
        assert row.zeros == max(row.zeros_before, int(row.size * sparsity)), row
    again = onnxprune.inspect(result.to_proto())
    zeros = {weight.name: weight.zeros for weight in again.weights}
    assert {row.name: row.zeros for row in result.report.rows}.items() <= zeros.items()


def identical(graph: Graph) -> None:
    """Sparsity 0 changes no byte but the record."""
    result = pruned(graph.model, sparsity=0.0)
    if result is not None:
        same = result.to_proto()
        same.ClearField("metadata_props")
        assert same.SerializeToString(deterministic=True) == graph.model.SerializeToString(deterministic=True)


def says(graph: Graph) -> None:
    """What is known of every value before the model runs is so: shape, type, content, and where pruning leaves 0."""
    plan = Plan.of(load(graph.model), {name: array.shape for name, array in graph.feed.items()})
    facts = plan.coupling.flow.facts
    if not facts.guessed:
        structure_oracle.check_known(facts, structure_oracle.values(plan.coupling.model, graph.feed))
    found = structure_oracle.nulls(plan, graph.feed)
    wrong = [(name, index) for name, index, null, zeros in found if null and not zeros]
    assert not wrong, wrong


def shrinks(graph: Graph, sparsity: float | None = None) -> None:
    """Without the channels that go it computes what it does with zeros in their place."""
    options = {"sparsity": sparsity or (0.5, 0.25, 0.75)[seed_of(graph) % 3], "pattern": "channel"}
    masked = pruned(graph.model, **options, keep_shape=True)
    shrunk = pruned(graph.model, **options)
    assert (masked is None) == (shrunk is None)
    if masked is not None and not graph.rough:
        found = apart(masked.to_proto(), shrunk.to_proto(), graph)
        assert found < tolerance(graph), found


def lowers(graph: Graph) -> None:
    """With grouped inputs, lowered is masked."""
    masked = pruned(graph.model, pattern="grouped:2", keep_shape=True)
    if masked is None:
        return
    model, _ = lowered(load(masked.to_proto()), latencies=Always())
    if not graph.rough:
        found = apart(masked.to_proto(), model.to_proto(), graph)
        assert found < tolerance(graph), found


def patches(graph: Graph) -> None:
    """A file that is patched is one that was loaded and saved; its data in it or beside it."""
    large = loading.LARGE
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder, "model.onnx"), Path(folder, "out", "pruned.onnx")
        target.parent.mkdir()
        try:
            if seed_of(graph) % 2:
                loading.LARGE = 0
                path.write_bytes(graph.model.SerializeToString())
            else:
                model_files.write_external(graph.model, path, model_files.LAYOUTS["one file"])
            loaded = load(path).to_proto()
            assert model_files.stored(loaded) == model_files.stored(graph.model)
            expected = pruned(loaded)
            if expected is None:
                return
            result = onnxprune.prune(path, [{"sparsity": 0.5}], output=target)
        finally:
            loading.LARGE = large
        assert result.masks == expected.masks
        assert load(target).to_proto() == load(expected.to_proto()).to_proto()


def threads(graph: Graph) -> None:
    """Masks do not depend on how many threads look for them."""
    names = ("THREADED", "MAX_THREADS", "SPAN")
    kept = [getattr(select, name) for name in names]
    found = []
    try:
        for values in ((1 << 22, 8, 1 << 20), (1, 2, 8), (1, 5, 3)):
            for name, value in zip(names, values, strict=True):
                setattr(select, name, value)
            result = pruned(graph.model, allocation=("uniform", "global", "erk")[seed_of(graph) % 3])
            found.append(None if result is None else result.masks.packed())
    finally:
        for name, value in zip(names, kept, strict=True):
            setattr(select, name, value)
    assert found[0] == found[1] == found[2]


def round_trip(graph: Graph) -> None:
    """Masks come back from a file, and a pruner that goes on from them revives nothing."""
    result = pruned(graph.model)
    if result is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "masks.npz")
        result.masks.save(path)
        masks = onnxprune.Masks.load(path)
    assert masks == result.masks
    config = [{"initial_sparsity": 0.5, "final_sparsity": 0.75, "start_epoch": 0, "end_epoch": 2}]
    pruner = onnxprune.AGPPruner(config)
    pruner.load_state_dict({"epoch": 0, "step": 0, "masks": masks})
    assert pruner.prune(graph.model).masks == masks
    pruner.load_state_dict({"epoch": 2, "step": 0, "masks": masks})
    later = pruner.prune(result.to_proto())
    assert not any((later.masks[name] & ~masks[name]).any() for name in masks)


def quantises(graph: Graph) -> None:
    """onnxruntime's quantisers keep every zero."""
    if graph.steps[0] != "float32":
        return
    result = pruned(graph.model)
    if result is None or not result.masks:
        return
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([graph.feed])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    symmetric = {"ActivationSymmetric": False, "WeightSymmetric": seed_of(graph) % 2 == 0}
    per = seed_of(graph) % 3 == 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("dynamic", "static"):
            target = Path(folder, f"{kind}.onnx")
            try:
                if kind == "dynamic":
                    q.quantize_dynamic(result.to_proto(), target, per_channel=per, weight_type=q.QuantType.QInt8)
                else:
                    q.quantize_static(result.to_proto(), target, Reader(), per_channel=per, extra_options=symmetric)
            except Exception as error:  # it cannot quantise that graph, pruned or not
                SAID[f"onnxruntime's {kind} quantiser: {type(error).__name__}"] += 1
                continue
            SAID[f"quantised {kind}"] += 1
            keeps_zeros(result.masks, dict(tensors(onnx.load(target))))


def keeps_zeros(masks: onnxprune.Masks, stored: dict[str, onnx.TensorProto]) -> None:
    for name, mask in masks.items():
        if f"{name}_quantized" not in stored or name in stored:
            continue
        codes = numpy_helper.to_array(stored[f"{name}_quantized"])
        zero = numpy_helper.to_array(stored[f"{name}_zero_point"])
        if codes.shape != mask.shape:  # recurrent weights are turned
            mask = mask.swapaxes(-1, -2)
        if zero.ndim > 1:  # a row for each direction
            zero = zero[:, None]
        elif zero.ndim:
            axis = next(i for i, n in enumerate(mask.shape) if n == zero.size)
            zero = zero.reshape([-1 if i == axis else 1 for i in range(mask.ndim)])
        assert (codes == zero)[~mask].all(), name


PROPERTIES: tuple[Callable[[Graph], None], ...] = (
    exact,
    identical,
    says,
    shrinks,
    lowers,
    patches,
    threads,
    round_trip,
    quantises,
)

SAID: Counter[str] = Counter()
"""What came of the graphs: for the summary."""


def check(graph: Graph, rarely: bool = True) -> None:
    """All properties on one graph that onnxruntime runs."""
    try:
        onnx.checker.check_model(graph.model)
        run(graph.model, graph)
    except Exception as error:  # operators without a kernel for a type
        SAID[f"onnxruntime does not run it: {type(error).__name__}"] += 1
        return
    SAID["graphs"] += 1
    for index, holds in enumerate(PROPERTIES):
        if holds is quantises and rarely and SAID["graphs"] % 10:
            continue
        try:
            holds(graph)
        except PruneError as error:
            if holds not in (shrinks, lowers) or not graph.rough or "differs from the masked one" not in str(error):
                raise AssertionError(f"{holds.__name__}: {error}") from error
            SAID[f"{holds.__name__}: refused, differs by rounding"] += 1
        SAID[holds.__name__] += 1
        del index


def explore(seed: int, count: int, say: float = 0.0) -> Counter[str]:
    """Check as many random graphs, the same ones for the same seed."""
    began = time.monotonic()
    told = [began]
    SAID.clear()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if count <= 1000 else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(graphs())
    def holds(graph: Graph) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # onnxruntime's quantisers warn of what is none of ours
            check(graph)
        if say and time.monotonic() - told[0] > say:
            told[0] = time.monotonic()
            print(f"seed {seed}: {SAID['graphs']} graphs, {told[0] - began:.0f} s", file=sys.stderr, flush=True)

    holds()
    return Counter(SAID)


CONVS = "(float[2,3,4,4] x) => (float[2,2,{}] y{}) {{ h = Conv(x, w) {} y = Conv(z, v) }}"

FOUND = [
    Net(
        "SpaceToDepth of columns first",
        CONVS.format("2,2", "", 'z = SpaceToDepth<blocksize=2, mode="CRD">(h)'),
        {"w": (4, 3, 1, 1), "v": (2, 16, 1, 1)},
        ("w 4",),
        {"v": "graph output 'y'"},
        opset=28,
    ),
    Net(
        "Size as an output",
        CONVS.format("4,4", ", int64 n", "z = Relu(h) n = Size(z)"),
        {"w": (4, 3, 1, 1), "v": (2, 4, 1, 1)},
        (),
        {"w": "graph output 'n' computes with its size", "v": "graph output 'y'"},
    ),
    Net(
        "statistics over steps",
        "(float[2,5,3] x) => (float[2,5,2] y) { h = MatMul(x, w)"
        " z, m, s = BatchNormalization<training_mode=1>(h, one, one, zero, one) y = MatMul(z, v) }",
        {"w": (3, 4), "v": (4, 2), "one": np.ones(5, np.float32), "zero": np.zeros(5, np.float32)},
        (),
        {"w": "BatchNormalization 'z' averages over it", "v": "graph output 'y'"},
    ),
    Net(
        "a state whose shape is computed from the size of another axis",
        "(float[2,5,4] x) => (float[2,6,6] y) { h = MatMul(x, w) s = Shape<start=2>(h) d = Concat<axis=0>(one, s, s)"
        " o = ConstantOfShape(d) q = MatMul(x, u) t = Transpose<perm=[0,2,1]>(q) p = MatMul(t, q) y = Add(p, o) }",
        {"w": (4, 6), "u": (4, 6), "one": ints(2)},
        (),
        {"w": "the shape of ConstantOfShape 'o' would be [2, 3, 3] where", "u": "graph output 'y'"},
    ),
]


@pytest.mark.parametrize("net", FOUND, ids=lambda net: net.name)
def test_found(net: Net) -> None:
    """What random graphs and ONNX's cases have found, as small as can be."""
    structure_oracle.check(net)


def test_random_graphs() -> None:
    found = explore(seed=0, count=300)
    assert found["graphs"] > 250
    assert all(found[holds.__name__] for holds in PROPERTIES)


@pytest.mark.slow
def test_many_random_graphs() -> None:
    """ONNXPRUNE_GRAPHS says how many; in as many processes as there are CPUs."""
    count, workers = int(os.environ.get("ONNXPRUNE_GRAPHS", "800")), os.cpu_count() or 1
    parts = 4 * workers
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        jobs = [pool.apply_async(explore, (1 + part, -(-count // parts), 10.0)) for part in range(parts)]
        found = sum((job.get() for job in jobs), Counter[str]())
    with contextlib.suppress(OSError):
        print("\n".join(f"{n:7} {what}" for what, n in sorted(found.items())))
    assert found["graphs"] > 0.85 * count
