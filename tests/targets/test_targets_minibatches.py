"""Potentials of clients: minibatches, unbiased over all sets of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_reference import CHAINS, SIZES, batch_keys, close, normal, stack
from torch import Tensor

from fedsample.random import Key, key
from fedsample.targets import Clients
from fedsample.targets.minibatch import draw_rows

pytestmark = pytest.mark.usefixtures("analysis")


def keys_of_all_batches(rows: int, size: int) -> Key:
    """(1, binomial(rows, size)) keys, one for each set of rows that a client may draw."""
    many = key(3, purpose="enumerate").fold(torch.arange(40 * len(list(itertools.combinations(range(rows), size)))))
    positions, valid = draw_rows(Key(many.tensor().unsqueeze(0)), torch.tensor([rows]), size)
    assert bool(valid.all())
    found = {tuple(sorted(drawn)): at for at, drawn in enumerate(positions[0].tolist())}
    assert sorted(found) == list(itertools.combinations(range(rows), size))
    return Key(many.tensor()[list(found.values())].unsqueeze(0))


def assert_unbiased(gradient: Callable[..., Tensor], clients: Clients, keys: Key, size: int) -> None:
    """The mean over all batches, each as likely as the next, is the full gradient."""
    theta = normal(1, clients.d)
    estimates = gradient(theta.expand(keys.shape[1], -1), keys=keys, batch_size=size)
    close(estimates.mean(1), clients.gradient(theta)[:, 0])
    assert float(estimates.std(1).max()) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["glm", "module"])
def test_minibatches_are_unbiased(kind: str, size: int) -> None:
    client = stack(kind).client(0)
    keys = keys_of_all_batches(SIZES[0], size)
    assert_unbiased(client.gradient, client, keys, size)

    def unscaled(theta: Tensor, **given: Any) -> Tensor:
        return client.gradient(theta, **given) * size / SIZES[0]

    def fixed(theta: Tensor, keys: Key, batch_size: int) -> Tensor:
        return client.gradient(theta, keys=Key(keys.tensor()[:, :1].expand(-1, len(theta))), batch_size=batch_size)

    for mutant in (unscaled, fixed):
        with pytest.raises(AssertionError):
            assert_unbiased(mutant, client, keys, size)


@pytest.mark.parametrize("kind", ["glm", "module"])
def test_minibatches_of_a_ragged_stack(kind: str) -> None:
    clients = stack(kind)
    theta = normal(1, clients.d).expand(CHAINS, -1)
    keys, full = batch_keys(clients.n), clients.gradient(theta)
    estimate = clients.gradient(theta, keys=keys, batch_size=3)
    assert torch.equal(clients.gradient(theta, keys=keys, batch_size=3), estimate)  # the same twice in a round
    rows = clients.rows
    close(estimate[rows <= 3], full[rows <= 3])  # a client with no more rows uses them all
    larger = rows > 3
    for other in (full, clients.gradient(theta, keys=batch_keys(clients.n, round=1), batch_size=3), estimate.flip(1)):
        assert not bool(torch.isclose(estimate[larger], other[larger]).all(-1).any())  # by round, and by chain
    close(clients.gradient(theta, keys=keys, batch_size=max(SIZES)), full)
    close(clients.gradient(theta, keys=keys, batch_size=100), full)
    assert torch.equal(clients.gradient(theta, keys=keys), full)
    for i in range(clients.n):
        alone = clients.client(i).gradient(theta, keys=batch_keys(1, first=i), batch_size=3)
        close(alone[0], estimate[i])
    some = torch.tensor([3, 1, 0])
    drawn = clients.gradient(theta, clients=some, keys=Key(keys.tensor()[some]), batch_size=3)
    close(drawn, estimate[some])


def assert_every_set_equally_likely(positions: Tensor, rows: int, size: int) -> None:
    """Counts of each set of rows within 5 standard errors; positions (draws, size)."""
    draws = len(positions)
    sets = list(itertools.combinations(range(rows), size))
    seen = [tuple(sorted(each)) for each in positions.tolist()]
    p = 1 / len(sets)
    for each in sets:
        assert abs(seen.count(each) - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5, each


def test_every_minibatch_is_equally_likely() -> None:
    rows, size, draws = 5, 2, 4000
    keys = Key(key(11, purpose="batch").fold(torch.arange(draws)).tensor().unsqueeze(0))
    positions, valid = draw_rows(keys, torch.tensor([rows]), size)
    assert bool(valid.all())
    assert_every_set_equally_likely(positions[0], rows, size)
    with_replacement = keys.integers(rows, size)[0]
    first_rows = torch.arange(size).expand(draws, -1)
    neighbours = (keys.integers(rows, 1)[0] + torch.arange(size)) % rows
    for mutant in (with_replacement, first_rows, neighbours):
        with pytest.raises(AssertionError):
            assert_every_set_equally_likely(mutant, rows, size)


def test_what_a_client_draws_does_not_depend_on_the_others() -> None:
    rows = torch.tensor([5, 0, 300, 1])
    keys = batch_keys(4)
    positions, valid = draw_rows(keys, rows, 4)
    assert valid.sum(-1).tolist() == [[4, 4], [0, 0], [4, 4], [1, 1]]
    for i in range(4):
        alone, counted = draw_rows(Key(keys.tensor()[i : i + 1]), rows[i : i + 1], 4)
        assert torch.equal(alone[counted], positions[i : i + 1][valid[i : i + 1]])
