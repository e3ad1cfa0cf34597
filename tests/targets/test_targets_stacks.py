"""Potentials of clients: stacks, chains, chunks and dtypes."""

from __future__ import annotations

import pytest
import torch
from loop_reference import CHAINS, CLASSES, F64, FEATURES, SIZES, batch_keys, close, everything, normal, stack
from rounding import SEES
from torch import Tensor

from fedsample.targets import ModuleClients
from fedsample.targets import glm as glm_module
from fedsample.targets import module as module_module

pytestmark = pytest.mark.usefixtures("analysis")

STACKS = ("glm", "glm-gaussian", "module", "module-gaussian", "dense", "diagonal")


@pytest.mark.parametrize("kind", ["glm", "module"])
def test_clients_without_rows_contribute_zero(kind: str) -> None:
    clients = stack(kind)
    theta = normal(CHAINS, clients.d)
    answers = everything(clients, theta, normal(CHAINS, clients.d, seed=5))
    answers["minibatch"] = clients.gradient(theta, keys=batch_keys(clients.n), batch_size=2)
    empty = clients.client(1)
    alone = everything(empty, theta, theta)
    alone["minibatch"] = empty.gradient(theta, keys=batch_keys(1), batch_size=2)
    for name in answers:
        assert not bool(answers[name][1].any()), name
        assert alone[name].shape == answers[name][1:2].shape
        assert not bool(alone[name].any()), name


@pytest.mark.parametrize("kind", STACKS)
def test_a_client_alone_answers_as_in_its_stack(kind: str) -> None:
    clients = stack(kind)
    theta, vector = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5)
    whole = everything(clients, theta, vector)
    chosen = torch.tensor([3, 0])
    for part, which in [(clients.client(i), torch.tensor([i])) for i in range(clients.n)] + [
        (clients.subset(chosen), chosen)
    ]:
        assert torch.equal(part.rows, clients.rows[which])
        for name, answer in everything(part, theta, vector).items():
            close(answer, whole[name][which])  # products of other shapes round differently


@pytest.mark.parametrize("kind", STACKS)
def test_chains_do_not_see_each_other(kind: str) -> None:
    clients = stack(kind)
    theta, vector = normal(3, clients.d), normal(3, clients.d, seed=5)
    together = everything(clients, theta, vector)
    for c in range(3):
        for name, answer in everything(clients, theta[c : c + 1], vector[c : c + 1]).items():
            if not name.startswith(("outer", "inner")):
                close(answer[:, 0], together[name][:, c])


@pytest.mark.parametrize(("chunk", "merge"), [(1, 1), (60, 60), (1, 1 << 22), (1 << 22, 1)])
@pytest.mark.parametrize("kind", ["glm", "module"])
def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int, merge: int) -> None:
    clients = stack(kind)
    theta, vector, keys = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5), batch_keys(clients.n)
    whole = everything(clients, theta, vector)
    whole["minibatch"] = clients.gradient(theta, keys=keys, batch_size=3)
    monkeypatch.setattr(glm_module, "_CHUNK", chunk)
    monkeypatch.setattr(module_module, "_CHUNK", chunk)
    monkeypatch.setattr(module_module, "_MERGE", merge)
    parts = everything(clients, theta, vector)
    parts["minibatch"] = clients.gradient(theta, keys=keys, batch_size=3)
    for name, answer in parts.items():
        close(answer, whole[name])


def test_chunks_bound_what_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = stack("module")
    assert isinstance(clients, ModuleClients)
    # Saved by a row: input 4, hidden 3 after the first layer, 3 outputs and their likelihood; counted from outside.
    assert FEATURES + 3 + CLASSES <= clients._cost <= 4 * (FEATURES + 3 + CLASSES)
    calls: list[int] = []
    forward = ModuleClients._forward

    def spy(self: ModuleClients, theta: Tensor, x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return forward(self, theta, x)

    monkeypatch.setattr(ModuleClients, "_forward", spy)
    monkeypatch.setattr(module_module, "_CHUNK", 2 * CHAINS * clients._cost)
    monkeypatch.setattr(module_module, "_MERGE", 1)
    clients.gradient(normal(CHAINS, clients.d))
    assert max(calls) == 2
    assert sum(calls) == sum(SIZES)
    calls.clear()
    monkeypatch.setattr(module_module, "_CHUNK", 1 << 25)
    monkeypatch.setattr(module_module, "_MERGE", 1 << 22)
    clients.gradient(normal(CHAINS, clients.d))
    assert len(calls) < sum(size > 0 for size in SIZES)  # small clients share a call


@pytest.mark.rounding
@pytest.mark.parametrize("kind", STACKS)
def test_single_precision_is_close_to_double(kind: str) -> None:
    double, single = stack(kind), stack(kind, torch.float32)
    theta, vector = normal(CHAINS, double.d), normal(CHAINS, double.d, seed=5)
    want, got = everything(double, theta, vector), everything(single, theta.float(), vector.float())
    keys = batch_keys(double.n)
    want["minibatch"] = double.gradient(theta, keys=keys, batch_size=2)
    got["minibatch"] = single.gradient(theta.float(), keys=keys, batch_size=2)
    for name, answer in got.items():
        assert answer.dtype == (F64 if name in ("potential", "value") else torch.float32), name
        close(answer, want[name], name, SEES[torch.float32])
        if name == "gradient":
            assert not torch.equal(answer.double(), want[name])
