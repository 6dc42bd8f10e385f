"""Masks held on parameters: exactly 0.0 after every step of every kind of training, and nothing else changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from onnxprune.converters.torch import LevelPruner
from torch import nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch_nets import Tied, Twice

from onnxprune import PruneError

X, Y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def loss(model, x=X):
    return nn.functional.cross_entropy(model(x), Y)


def hold(model, sparsity=0.5, **entry):
    return LevelPruner([{"sparsity": sparsity, **entry}])(model)


class Check:
    """Pruned entries are +0.0 to the bit and the same ones as at the start; the others move."""

    def __init__(self, model):
        self.values = {n: p for n, p in model.named_parameters() if p.ndim > 1}
        self.pruned = {n: p.detach() == 0 for n, p in self.values.items()}
        assert all(mask.any() and not mask.all() for mask in self.pruned.values())
        self.before = {n: p.detach().clone() for n, p in self.values.items()}

    def __call__(self, moving=True):
        for name, value in self.values.items():
            mask = self.pruned[name]
            value = value.detach()
            assert not value.view(BITS[value.element_size()])[mask].any(), name
            assert (value[~mask] != 0).float().mean() > 0.9
            moved = (value != self.before[name])[~mask].float().mean()
            assert moved > 0.5 if moving else moved == 0, name
            self.before[name] = value.clone()


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: optim.Adam(p, 1e-2, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: optim.AdamW(p, 1e-2, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, 1e-2, fused=True),
    "sgd fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "amsgrad": lambda p: optim.Adam(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-2, momentum=0.9),
    "adagrad": lambda p: optim.Adagrad(p, 1e-2),
    "nadam": lambda p: optim.NAdam(p),
    "adafactor": lambda p: optim.Adafactor(p),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_and_survivors_move(kind):
    model = net()
    keys, modules = list(model.state_dict()), [n for n, _ in model.named_modules()]
    optimizer = OPTIMIZERS[kind](model.parameters())
    hold(model)
    check = Check(model)
    for _ in range(4):
        loss(model).backward()
        for name, mask in check.pruned.items():
            assert not check.values[name].grad[mask].any()
        optimizer.step()
        check()
        optimizer.zero_grad()
    assert keys == list(model.state_dict())
    assert modules == [n for n, _ in model.named_modules()]


def test_accumulation_and_clipping_see_the_pruned_net():
    model = net()
    hold(model)
    check, optimizer = Check(model), optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        for _ in range(3):
            loss(model).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        live = [p.grad[~check.pruned[n]] if n in check.pruned else p.grad for n, p in model.named_parameters()]
        assert torch.allclose(norm, torch.stack([g.norm() for g in live]).norm())
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        check()
        optimizer.zero_grad()


def test_masks_that_come_after_momentum_was_built_up():
    model = net()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
    hold(model)
    check = Check(model)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        check()


def test_lbfgs_searches_among_pruned_nets_only():
    model = net()
    hold(model)
    check, optimizer = Check(model), optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(sum(int((check.values[n][mask] != 0).sum()) for n, mask in check.pruned.items()))
        value = loss(model)
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(closure)
        check()
    assert len(calls) > 5
    assert not any(calls)


def test_mixed_precision_with_a_scaler():
    model = net()
    hold(model)
    check, optimizer, scaler = Check(model), optim.AdamW(model.parameters(), 1e-2), torch.amp.GradScaler("cpu")
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        check()
        optimizer.zero_grad()
    (scaler.scale(loss(model)) * float("inf")).backward()
    scaler.step(optimizer)
    check(moving=False)  # the overflowing step is left out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model = net().to(dtype)
    hold(model)
    check, optimizer = Check(model), optim.AdamW(model.parameters(), 5e-2)
    for _ in range(3):
        loss(model, X.to(dtype)).backward()
        optimizer.step()
        check()
        optimizer.zero_grad()


def test_half_precision_by_hand():
    model = nn.Linear(8, 6).half()
    hold(model)
    check, optimizer = Check(model), optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for _ in range(3):
        model.weight.grad = torch.randn(6, 8).half()
        optimizer.step()
        check()


def test_not_a_number_in_a_pruned_entry_becomes_zero():
    model = net()
    pruner = hold(model)
    check = Check(model)
    with torch.no_grad():
        for name, mask in check.pruned.items():
            check.values[name][mask] = float("nan")
    pruner.apply()
    check(moving=False)


def test_compiled_models_and_compiled_steps():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net()
        compiled = torch.compile(model, backend="aot_eager")
        hold(compiled)
        check, optimizer = Check(model), optim.AdamW(model.parameters(), torch.tensor(1e-2))
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        for turn in range(4):
            loss(compiled).backward()
            optimizer.step() if turn < 2 else step()
            check()
            optimizer.zero_grad()


def test_several_optimizers_and_one_for_something_else():
    model, other = net(), nn.Linear(2, 2)
    hold(model)
    check = Check(model)
    one, two = optim.SGD(model[:4].parameters(), 0.1), optim.AdamW(model[4:].parameters(), 1e-2)
    three = optim.SGD(other.parameters(), 0.1)
    for _ in range(3):
        loss(model).backward()
        one.step()
        two.step()
        other(torch.ones(1, 2)).sum().backward()
        three.step()
        check()
        model.zero_grad()
    assert (other.weight != 0).all()


def test_several_pruners_on_one_model():
    model = net()
    first = hold(model, 0.6, op_types="Conv2d")
    second = hold(model, 0.3, op_types="Linear")
    check, optimizer = Check(model), optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
        check()
    second.remove()
    loss(model).backward()
    optimizer.step()
    assert (model[4].weight == 0).sum() < check.pruned["4.weight"].sum()
    assert torch.equal(model[0].weight == 0, check.pruned["0.weight"])
    assert first.report.rows[0].zeros == int(check.pruned["0.weight"].sum())


def test_frozen_parameters_are_pruned_once_and_held_when_they_thaw():
    model = net()
    model[4].weight.requires_grad_(False)
    hold(model)
    check, optimizer = Check(model), optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    assert not model[4].weight._post_accumulate_grad_hooks
    frozen = model[4].weight.detach().clone()
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(frozen, model[4].weight)
    model[4].weight.requires_grad_(True)
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
        check()
        optimizer.zero_grad()


def test_tied_weights():
    torch.manual_seed(0)
    model = Tied()
    hold(model)
    check, optimizer = Check(model), optim.Adam(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.arange(20)).logsumexp(1).sum().backward()
        optimizer.step()
        check()
    assert model.head.weight is model.embedding.weight


def test_shared_modules():
    torch.manual_seed(0)
    model = Twice()
    hold(model, op_types="Linear")
    check, optimizer = Check(nn.Sequential(model.first)), optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        check()
        optimizer.zero_grad()
    assert model.again is model.first


def test_sparse_gradients():
    model = nn.Embedding(10, 4, sparse=True)
    hold(model, op_types="Embedding")
    check, optimizer = Check(model), optim.SparseAdam(model.parameters(), 0.1)
    model(torch.arange(10)).sum().backward()
    optimizer.step()
    check()


def test_copies_and_pickles_are_plain_models():
    model = net()
    hold(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        zeros = int((twin[4].weight == 0).sum())
        optimizer = optim.SGD(twin.parameters(), 0.1)
        loss(twin).backward()
        optimizer.step()
        assert int((twin[4].weight == 0).sum()) < zeros


def test_moved_reloaded_and_replaced_parameters():
    model = net()
    hold(model)
    check, optimizer = Check(model), optim.SGD(model.parameters(), 0.1)

    def step():
        loss(model).backward()
        optimizer.step()
        check()
        optimizer.zero_grad()

    step()
    model.double().float().to(memory_format=torch.channels_last)
    step()
    model.load_state_dict(net(7).state_dict())
    step()
    model.load_state_dict(net(8).state_dict(), assign=True)
    optimizer = optim.SGD(model.parameters(), 0.1)
    check.values = dict(model.named_parameters()) | {}
    check.values = {n: p for n, p in check.values.items() if n in check.pruned}
    step()
    loss(model).backward()
    assert not model[4].weight.grad[check.pruned["4.weight"]].any()
    model.bfloat16()
    optimizer = optim.SGD(model.parameters(), 0.1)
    loss(model, X.bfloat16()).backward()
    optimizer.step()
    assert not model[4].weight.view(torch.int16)[check.pruned["4.weight"]].any()
    model[6] = nn.Linear(16, 5)
    with pytest.raises(PruneError, match=r"mask of parameter '6.weight' has the shape \[4, 16\].*now \[5, 16\]"):
        optim.SGD(model.parameters(), 0.1).step()


def test_masks_live_with_the_model_and_not_longer():
    gc.collect()
    hooks = len(_global_optimizer_post_hooks)
    model = net()
    hold(model)  # nobody keeps the pruner
    gc.collect()
    check, optimizer = Check(model), optim.SGD(model.parameters(), 0.1)
    loss(model).backward()
    optimizer.step()
    check()
    gone = weakref.ref(model)
    del model, optimizer, check
    gc.collect()
    assert gone() is None
    assert len(_global_optimizer_post_hooks) == hooks


def test_optimizers_that_step_inside_backward():
    model = net()
    hold(model)
    check = Check(model)
    optimizers = {p: optim.SGD([p], 0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        loss(model).backward()
        check()
