"""What pruning a weight must mean, found out by running the net: the reference for onnxprune.graph."""

from __future__ import annotations

import numpy as np
import onnx
from nets import Net, Operand, changed, keeps, run, seen
from onnx import numpy_helper

import onnxprune


def check(net: Net) -> None:
    """Prune a net at 0.5 and compare with its literal masks and with what onnxruntime computes."""
    onnx.checker.check_model(net.model)
    before = net.model.SerializeToString(deterministic=True)
    result = onnxprune.prune(net.model, [{"sparsity": 0.5, "op_types": net.op_types}])
    assert net.model.SerializeToString(deterministic=True) == before, "the model given was changed"
    assert result.report.skipped == ()
    assert [row.name for row in result.report.rows] == list(net.masks) == list(result.masks)
    pruned = result.to_proto()
    check_others(net, pruned)
    for row in result.report.rows:
        mask = result.masks[row.name]
        literal = "".join("01"[int(k)] for k in mask.reshape(-1))
        assert row.op_type == net.types.get(row.name, net.model.graph.node[-1].op_type)
        sources = [reached(net, row.name, operand) for operand in net.seen[row.name]]
        size, expected = expected_mask(net, row.name, sources)
        assert np.array_equal(mask.reshape(-1), expected), f"{row.name}: not the smallest: {literal}"
        assert np.array_equal(mask.reshape(-1), keeps(net.masks[row.name])), f"{row.name}: {literal}"
        assert (row.size, row.zeros_before, row.zeros) == (size, 0, int(size * 0.5))
        assert np.count_nonzero(~mask) == row.zeros
        check_stored(net, row.name, pruned, mask)
        for operand, source in zip(net.seen[row.name], sources, strict=True):
            check_seen(net, operand, pruned, mask, source)
    if net.runs:
        run(pruned)


def check_others(net: Net, pruned: onnx.ModelProto) -> None:
    """Nothing but the weights changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(pruned)
    copy.ClearField("metadata_props")
    for name in net.masks:
        net.tensor(name, copy).CopyFrom(net.tensor(name, net.model))
    assert copy == net.model


def check_stored(net: Net, name: str, pruned: onnx.ModelProto, mask: np.ndarray) -> None:
    """Every kept entry is bit-identical, in the same type and shape."""
    old, new = net.tensor(name, net.model), net.tensor(name, pruned)
    assert (old.data_type, list(old.dims), old.name) == (new.data_type, list(new.dims), new.name)
    was, now = numpy_helper.to_array(old), numpy_helper.to_array(new)
    assert mask.shape == was.shape
    assert was[mask].tobytes() == now[mask].tobytes()


def check_seen(net: Net, operand: Operand, pruned: onnx.ModelProto, mask: np.ndarray, source: np.ndarray) -> None:
    """The operator sees exactly 0.0 where an entry was pruned, and elsewhere what it saw before."""
    dense, now = seen(net.model, operand), seen(pruned, operand)
    ours = source >= 0
    gone = ours & ~mask.reshape(-1)[source]
    fixed = ours & ~gone if len(net.masks) > 1 else ~gone  # other entries may be another weight's
    assert gone.any()
    assert np.all(operand.real(now)[gone] == 0.0)
    assert np.array_equal(now[fixed], dense[fixed])


def reached(net: Net, name: str, operand: Operand) -> np.ndarray:
    """For every entry of an operand the stored entry it comes from, or -1: by changing stored entries and looking.

    Stored entry i is changed in those runs whose bit of i + 1 is set.
    """
    array = numpy_helper.to_array(net.tensor(name, net.model))
    numbers = np.arange(1, array.size + 1).reshape(array.shape)
    dense = seen(net.model, operand)
    source = np.zeros(dense.shape, np.int64)
    for bit in range(array.size.bit_length()):
        other = array.copy()
        flip = (numbers >> bit) & 1 == 1
        if np.dtype(array.dtype).name in {"float16", "bfloat16", "float32", "float64"}:
            other[flip] = -array[flip]
        else:
            other[flip] = (array[flip].astype(np.int64) ^ 1).astype(array.dtype)
        source |= (seen(changed(net.model, net, name, other), operand) != dense).astype(np.int64) << bit
    return source - 1


def expected_mask(net: Net, name: str, sources: list[np.ndarray]) -> tuple[int, np.ndarray]:
    """How many entries reach an operand, and the mask: the half of smallest magnitude goes, ties by role order."""
    rank: dict[int, tuple[float, int]] = {}
    for operand, source in zip(net.seen[name], sources, strict=True):
        dense = seen(net.model, operand)
        values = operand.role(operand.real(dense)).reshape(-1)
        for entry, value in zip(operand.role(source).reshape(-1).tolist(), values.tolist(), strict=True):
            if entry >= 0:
                rank.setdefault(entry, (abs(value), len(rank)))
    keep = np.ones(numpy_helper.to_array(net.tensor(name, net.model)).size, np.bool_)
    keep[sorted(rank, key=rank.__getitem__)[: len(rank) // 2]] = False
    return len(rank), keep
