"""Two gloo processes started by torchrun: the same masks and weights on every rank, after every update."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = '''
import os
import sys
import warnings

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from onnxprune import PruneError
from onnxprune.converters.torch import AGPPruner, LevelPruner

warnings.simplefilter("error")
torch.set_num_threads(1)
distributed.init_process_group("gloo")
RANK = distributed.get_rank()
EPOCHS = [{"initial_sparsity": 0.3, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 4}]
STEPS = [{"initial_sparsity": 0.3, "final_sparsity": 0.8, "end_step": 6, "frequency": 2}]


def build(seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    return nn.Sequential(*layers)


def everywhere(value):
    """The values of all ranks."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def same_everywhere(pruner, model):
    masks = {name: pruner.masks[name].tobytes() for name in pruner.masks}
    weights = {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}
    for left, right in zip(*everywhere((masks, weights))):
        assert left == right, [name for name in left if left[name] != right[name]]


def held(pruner, model):
    parameters = dict(model.named_parameters())
    for name in pruner.masks:
        assert not parameters[name].detach().numpy()[~pruner.masks[name]].any(), name


def train(order, config):
    model = build(RANK)  # other weights on every rank
    pruner = AGPPruner(config)
    if order == "before":
        pruner(model)
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = DistributedDataParallel(model)
        pruner(wrapped)
    same_everywhere(pruner, model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
    sparsities = [pruner.sparsity]
    for step in range(8):
        torch.manual_seed(100 * RANK + step)  # other data on every rank
        loss = nn.functional.cross_entropy(wrapped(torch.randn(8, 1, 8, 8)), torch.randint(0, 10, (8,)))
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        held(pruner, model)
        if config is STEPS:
            pruner.step()
        elif step % 2:
            pruner.update_epoch(step // 2 + 1)
        same_everywhere(pruner, model)
        sparsities.append(pruner.sparsity)
    assert sparsities == sorted(sparsities) and sparsities[0] > 0.25 and sparsities[-1] > 0.78, sparsities
    resumed = AGPPruner(config)
    resumed.load_state_dict(pruner.state_dict())
    pruner.remove()
    resumed(wrapped)
    assert resumed.masks == pruner.masks
    same_everywhere(resumed, model)
    resumed.remove()


def rank_zero_decides():
    model = build(RANK)
    pruner = LevelPruner([{"sparsity": 0.5}])
    pruner(model)
    for name, weights in build(0).named_parameters():
        if name in pruner.masks:
            flat = weights.detach().abs().reshape(-1).argsort(stable=True)[: int(weights.numel() * 0.5)]
            expected = np.ones(weights.numel(), bool)
            expected[flat.numpy()] = False
            assert np.array_equal(pruner.masks[name].reshape(-1), expected), name


def other_models_are_refused():
    model = nn.Linear(8, 8 + RANK)
    try:
        LevelPruner([{"sparsity": 0.5}])(model)
    except PruneError as error:
        assert "ranks [1] prune weights of other names or shapes than rank 0" in str(error), error
    else:
        raise AssertionError("no error")
    assert (model.weight != 0).all()


for case, arguments in [
    (train, ("after", EPOCHS)),
    (train, ("before", EPOCHS)),
    (train, ("after", STEPS)),
    (train, ("before", STEPS)),
    (rank_zero_decides, ()),
    (other_models_are_refused, ()),
]:
    case(*arguments)
    if RANK == 0:
        print("passed", case.__name__, *arguments[:1], flush=True)
distributed.barrier()
distributed.destroy_process_group()
sys.stdout.flush()
# Threads of gloo may outlive the group and abort the interpreter while it ends (pytorch/pytorch pull request 179291).
os._exit(0)
'''


@pytest.mark.slow
def test_every_rank_holds_the_same_masks(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (run.returncode, run.stdout.count("passed")) == (0, 6), run.stdout + run.stderr[-5000:]
