"""Calibration: what is summed over a layer's inputs, held against torch and numpy; and the score made of it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from nets import parse

from onnxprune.graph.model import load
from onnxprune.graph.weights import find
from onnxprune.runtime import calibrate
from onnxprune.runtime.feeds import load_data
from onnxprune.runtime.session import open_session

RNG = np.random.default_rng(6)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def calibrated(proto: onnx.ModelProto, data: object, memory: str | None = None):
    """The layers of all weights of a model, and its data."""
    model = load(proto)
    layers, reasons = calibrate.find_layers(model, find(model)[0])
    dataset = load_data(data, open_session(proto).inputs)
    return model, layers, reasons, calibrate.calibration(model, dataset, layers, memory, 1)


def gram(proto: onnx.ModelProto, data: object, memory: str | None = None) -> dict[str, np.ndarray]:
    """Weight -> (groups, inputs, inputs), summed feed by feed."""
    model, layers, reasons, cal = calibrated(proto, data, memory)
    assert not reasons
    found = {}
    for layer in layers:
        every = np.ones(layer.places.shape[0], np.bool_)
        halves = calibrate.moments([(layer, every)], cal.stream(model), None, cal, layer.place)
        total = halves[0] + halves[1]
        np.testing.assert_allclose(total.x, rows_of(layer, cal, model).sum(1), rtol=1e-6, atol=1e-6)
        found[layer.weight.name] = total.xx
    return found


def rows_of(layer, cal, model) -> np.ndarray:
    stream = cal.stream(model)
    parts = [b for arrays in stream.read(layer.inputs.values) for b in calibrate.blocks(layer, arrays)]
    return np.concatenate(parts, 1)


def outer(rows: np.ndarray) -> np.ndarray:
    """(groups, rows, inputs) to the Gram matrices."""
    wide = rows.astype(np.float64)
    return np.einsum("gni,gnj->gij", wide, wide)


CONVS = [
    # channels in and out, size, kernel, stride, pads (begin, end), dilation, group
    pytest.param(4, 6, (9, 8), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, id="plain"),
    pytest.param(4, 6, (9, 8), (3, 2), (2, 3), ((1, 1), (0, 0)), (1, 1), 1, id="strides"),
    pytest.param(4, 6, (9, 8), (3, 3), (1, 2), ((2, 1), (0, 3)), (1, 1), 2, id="pads, groups"),
    pytest.param(4, 6, (11, 9), (3, 2), (2, 1), ((1, 2), (2, 0)), (2, 3), 2, id="dilations, groups"),
    pytest.param(5, 5, (7, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 5, id="depthwise"),
    pytest.param(3, 4, (12,), (4,), (3,), ((2, 1),), (2,), 1, id="1-D"),
    pytest.param(2, 4, (5, 6, 4), (2, 3, 2), (1, 2, 1), ((1, 0), (1, 1), (0, 1)), (1, 1, 2), 2, id="3-D"),
    pytest.param(4, 4, (6, 6), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, id="1x1"),
]


def unfolded(x: np.ndarray, kernel, stride, pads, dilation, group) -> np.ndarray:
    """(groups, windows, inputs * kernel) with torch alone: one position of the kernel after the other."""
    flat = [amount for begin, end in reversed(pads) for amount in (begin, end)]
    padded = torch.nn.functional.pad(torch.from_numpy(x), flat)
    counts = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        where = [
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, counts, stride, strict=True)
        ]
        taps.append(padded[(slice(None), slice(None), *where)].reshape(*x.shape[:2], -1))
    rows = torch.stack(taps, -1)  # samples, inputs, windows, kernel
    samples, inputs, windows, size = rows.shape
    grouped = rows.reshape(samples, group, inputs // group, windows, size).permute(1, 0, 3, 2, 4)
    return grouped.reshape(group, samples * windows, -1).numpy()


@pytest.mark.parametrize(("inputs", "outputs", "size", "kernel", "stride", "pads", "dilation", "group"), CONVS)
def test_the_gram_matrix_of_a_convolution(inputs, outputs, size, kernel, stride, pads, dilation, group):
    flat = [*(p[0] for p in pads), *(p[1] for p in pads)]
    node = (
        f"Conv<kernel_shape={list(kernel)}, strides={list(stride)}, pads={flat}, dilations={list(dilation)}, "
        f"group={group}>(x, w)"
    )
    dims = ["N", inputs, *size]
    text = f"(float[{','.join(map(str, dims))}] x) => (float[{','.join('ABCDE'[: len(dims)])}] y) {{ y = {node} }}"
    proto = parse(text, w=normal(outputs, inputs // group, *kernel))
    x = normal(7, inputs, *size)
    rows = unfolded(x, kernel, stride, pads, dilation, group)
    np.testing.assert_allclose(gram(proto, {"x": x})["w"], outer(rows), rtol=1e-6, atol=1e-6)
    # the rows times the weight are the convolution's result
    w = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    y = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    product = np.einsum("gnk,gok->gon", rows, w.reshape(group, outputs // group, -1))
    expected = product.reshape(outputs, 7, -1).swapaxes(0, 1).reshape(y.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
