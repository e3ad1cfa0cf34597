"""The tree of sums: one order, term by term or at once, whole or by aligned shards."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_within, gamma, sum_error
from torch import Tensor

from fedsample.numerics.tree_sum import TreeSum, tree_sum


def terms(n: int) -> Tensor:
    """(n, 40) float32 of very different sizes, so that another order rounds to other bits."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 40, generator=generator) * 10.0 ** torch.randn(n, 40, generator=generator)


def by_term(values: Tensor) -> Tensor:
    total = TreeSum()
    for term in values:
        total.add(term)
    return total.total()


@pytest.mark.parametrize("n", range(1, 34))
def test_term_by_term_equals_at_once(n: int) -> None:
    values = terms(n)
    assert torch.equal(by_term(values), tree_sum(values))
    assert_within(tree_sum(values.double()), values.double().sum(0), 2 * sum_error(values.double()))


def test_the_order_is_the_pairing_of_neighbours() -> None:
    a, b, c, d, e, f, g = terms(7)
    assert torch.equal(tree_sum(torch.stack([a, b, c, d, e, f, g])), ((a + b) + (c + d)) + ((e + f) + g))
    assert not torch.equal(tree_sum(terms(7)), a + b + c + d + e + f + g)


@pytest.mark.parametrize("n", [1, 5, 8, 21, 33])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_aligned_shards_make_no_difference(n: int, block: int) -> None:
    values = terms(n)
    shards = torch.stack([by_term(shard) for shard in values.split(block)])
    assert torch.equal(tree_sum(shards), tree_sum(values))


def test_shards_that_are_not_aligned_do_make_a_difference() -> None:
    values = terms(33)
    shards = torch.stack([tree_sum(shard) for shard in values.split(3)])
    assert not torch.equal(tree_sum(shards), tree_sum(values))


def test_a_total_taken_midway_changes_nothing() -> None:
    values, total = terms(21), TreeSum()
    for k, term in enumerate(values, start=1):
        total.add(term)
        assert torch.equal(total.total(), tree_sum(values[:k]))


def test_the_terms_stay_as_they_were() -> None:
    values = terms(13)
    before = values.clone()
    tree_sum(values)
    by_term(values)
    assert torch.equal(values, before)


def test_rounding_grows_with_the_depth_of_the_tree() -> None:
    values = terms(1 << 12).abs()
    exact = values.double().sum(0)
    assert_within(tree_sum(values), exact, gamma(12, torch.float32) * exact)  # a term is rounded once a level


def test_no_terms_have_no_sum() -> None:
    with pytest.raises(ValueError, match="no terms"):
        TreeSum().total()
