"""Latency: what counts as a difference is decided on literal times; of measured ones nothing is expected."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxprune.errors import PruneError
from onnxprune.runtime.benchmark import Benchmark, Latency, benchmark, compare


def stack(layers: int, width: int = 256, batch: int | str = 4) -> onnx.ModelProto:
    """A chain of square MatMuls and ReLUs, from x to y."""
    lines = "".join(f"m{i} = MatMul({'x' if i == 0 else f'r{i - 1}'}, w{i}) r{i} = Relu(m{i}) " for i in range(layers))
    text = f"g (float[{batch}, {width}] x) => (float[{batch}, {width}] y) {{ {lines} y = Identity(r{layers - 1}) }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    for i in range(layers):
        weight = rng.standard_normal((width, width)).astype(np.float32) * (2 / width) ** 0.5
        model.graph.initializer.append(numpy_helper.from_array(weight, f"w{i}"))
    return model


@pytest.mark.parametrize(
    ("loads", "speedup", "end"),
    [
        ([(0.002, 0.002)] * 4, 1.0, "2.00 ms vs 2.00 ms dense (1 thread): no measurable difference"),
        ([(0.02, 0.001)] * 4, 0.05, "20.0 ms vs 1.00 ms dense (1 thread): 20.00 times slower"),
        ([(0.001, 0.02)] * 4, 20.0, "1.00 ms vs 20.0 ms dense (1 thread): 20.00 times faster"),
        ([(0.001, 0.002)] * 3 + [(0.002, 0.001)], 2.0, "no measurable difference"),  # one load disagrees
    ],
)
def test_the_verdict_on_given_times(
    loads: list[tuple[float, float]], speedup: float, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(loads)
    monkeypatch.setattr("onnxprune.runtime.benchmark._time", lambda *_: [[seconds] * 5 for seconds in next(given)])
    result = benchmark(stack(1), stack(1))
    assert next(given, None) is None, "not every load was timed"
    assert result.speedup == pytest.approx(speedup)
    assert result.significant == (not end.endswith("difference"))
    assert result.summary().endswith(end)


def test_a_model_against_a_larger_one() -> None:
    result = benchmark(stack(2), stack(4), min_time=0.1)
    assert result.baseline is not None
    assert result.speedup is not None
    assert min(result.latency.low, result.baseline.low, result.speedup) > 0
    assert " ms dense (1 thread): " in result.summary()


STEADY = [1.0, 1.01, 0.99, 1.02, 0.98]


@pytest.mark.parametrize(
    ("times", "baseline", "speedup", "significant"),
    [
        ([STEADY], [STEADY], 1.0, False),
        ([[1.0] * 5], [[2.0, 2.1, 1.9, 2.0, 2.2]], 2.0, True),
        ([[2.0] * 5], [[1.0] * 5], 0.5, True),
        ([[1.0] * 5], [[1.02] * 5], 1.02, False),  # steady, but too small
        ([[1.0] * 5], [[0.5, 0.9, 1.5, 1.6, 1.7]], 1.5, False),  # large, but inside the spread
        ([[1.0] * 5, [1.0] * 5], [[1.3] * 5, [0.9] * 5], 1.1, False),  # a second load disagrees
        ([[1.0] * 5, [1.0] * 5], [[1.3] * 5, [1.2] * 5], 1.25, True),
        ([[1.0, 100.0, 1.0, 1.0, 1.0]], [[1.5, 150.0, 1.5, 1.5, 90.0]], 1.5, True),  # a hiccup in both, and in one
    ],
)
def test_what_counts_as_a_difference(
    times: list[list[float]], baseline: list[list[float]], speedup: float, significant: bool
) -> None:
    found, counts = compare(times, baseline)
    assert found == pytest.approx(speedup)
    assert counts == significant


def result(model: float, dense: float | None, significant: bool, threads: int = 1) -> Benchmark:
    return Benchmark(
        latency=Latency(model, model * 0.9, model * 1.1),
        baseline=None if dense is None else Latency(dense, dense, dense),
        speedup=None if dense is None else dense / model,
        significant=significant,
        threads=threads,
        runs=20,
        shapes={"x": (1, 3)},
        notes=("assumed",),
        versions={"onnxruntime": "1"},
    )


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        (result(1.52, 1.53, False), "latency 1.52 ms vs 1.53 ms dense (1 thread): no measurable difference"),
        (result(1.0, 2.5, True, 2), "latency 1.00 ms vs 2.50 ms dense (2 threads): 2.50 times faster"),
        (result(250, 125, True), "latency 250 ms vs 125 ms dense (1 thread): 2.00 times slower"),
        (result(10, None, False), "latency 10.0 ms (1 thread; middle half of 20 runs: 9.00 ms to 11.0 ms)"),
    ],
)
def test_summary(values: Benchmark, summary: str) -> None:
    assert values.summary() == summary


def test_the_result_states_how_it_was_measured() -> None:
    measured = benchmark(stack(1, batch="N"), stack(1, batch="N"), runs=7, threads=2)
    assert (measured.runs, measured.threads, measured.shapes) == (7, 2, {"x": (1, 256)})
    assert measured.notes == ("input 'x' float32[N, 256] is taken as 1x256; set it with --shape x=1x256",)
    assert set(measured.versions) == {"onnxruntime", "numpy", "python"}
    assert measured.latency.low <= measured.latency.median <= measured.latency.high
    found = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert found["shapes"] == {"x": [1, 256]}
    assert found["latency"]["median"] == measured.latency.median
    assert found["runs"] == 7


@pytest.mark.parametrize("runs", [1, 3, 4, 10])
def test_the_number_of_runs_is_kept(runs: int) -> None:
    assert benchmark(stack(1), stack(1), runs=runs).runs == runs
    assert benchmark(stack(1), runs=runs).runs == runs


def test_without_a_baseline() -> None:
    measured = benchmark(stack(1), min_time=0.05)
    assert measured.baseline is measured.speedup is None
    assert not measured.significant
    assert measured.to_dict()["baseline"] is None


def test_shapes_and_feeds() -> None:
    model = stack(1, batch="N")
    assert benchmark(model, shapes={"x": (3, 256)}, runs=2).shapes == {"x": (3, 256)}
    measured = benchmark(model, feeds={"x": np.ones((5, 256))}, runs=2)
    assert (measured.shapes, measured.notes) == ({"x": (5, 256)}, ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": 0}, "runs is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"shapes": {"x": (1, 256)}, "feeds": {"x": np.ones((1, 256))}}, "shapes and feeds are both given"),
        ({"shapes": {"x": (1, 3)}}, "the shape 1x3 does not fit"),
        ({"feeds": {"x": np.ones((1, 3))}}, "expected 'x'"),
        ({"baseline": stack(1, width=8)}, "take different inputs"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        benchmark(stack(1, batch="N"), **arguments)  # type: ignore[arg-type]
