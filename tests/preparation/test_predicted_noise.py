"""What predictions take a compressor's noise for: its mean where omega is a worst case, less what partitions cancel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moment_maps import Array, Chain, coordinate, independent_pairs
from scalar_pairs import theory

import fedsample
from fedsample.compression import QSGD, LinkKeys, Natural, PermK, build
from fedsample.preparation.curvature import GeometryProbe
from fedsample.preparation.step_rule import _weighted
from fedsample.strategies.langevin import LangevinTheory
from fedsample.theory.covariance import Covariance
from fedsample.theory.moments import Coordinate

DRAWS = 4000


def short(quadratics: Path) -> dict[str, Any]:
    """A run on quadratics for the sake of what it predicts."""
    data = {"kind": "quadratic", "file": str(quadratics)}
    length = {"chains": 1, "rounds": 8, "warmup": 0, "thin": 1}
    return {"data": data, "dtype": "float64", **length, "monitor": {"tensorboard": False}}


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(
    ("name", "levels"),
    [("qsgd", 1), ("qsgd", 3), ("qsgd", 127), ("natural", 7), ("bf16", 7), ("randk", 7), ("randk+qsgd", 3)],
)
def test_noise_of_normal_entries_by_keyed_draws(name: str, levels: int, spread: float) -> None:
    d = 48
    compressor = build(name, 12, levels=levels)
    scales = torch.from_numpy(np.geomspace(1, spread, d))
    vectors = torch.randn(DRAWS, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scales
    keys = LinkKeys(0, 0, DRAWS, "noise").at(1)
    packet = compressor.compress(vectors, keys)
    squares = (compressor.decompress(packet, d) - vectors).square()
    want = compressor.noise(scales.square().numpy())
    assert float(squares.sum(-1).mean()) == pytest.approx(want.sum(), rel=0.03 if spread == 1.0 else 0.1)
    if name == "qsgd" and (levels > 1 or spread == 1.0):
        assert squares.mean(0).numpy() == pytest.approx(want, rel=0.25)
    assert compressor.inclusion(d) <= compressor.typical(d) <= 1
    if spread == 1.0:
        assert compressor.noise(np.ones(d)) == pytest.approx(np.full(d, 1 / compressor.typical(d) - 1), rel=1e-9)


def test_noise_of_nothing_and_of_one_entry_is_none() -> None:
    assert not build("qsgd", levels=3).noise(np.zeros(5)).any()
    assert build("qsgd", levels=1).typical(1) == 1.0


def partition(chain: Chain) -> tuple[Array, Array]:
    """Mean and covariance of the bits of a partition: one client has a coordinate, each with probability 1 / n."""
    n, d = chain.n, chain.d
    own = np.einsum("il,jk->ijlk", np.eye(n) / n, np.eye(d))
    apart = np.einsum("il,jk->ijlk", np.ones((n, n)) / n**2, 1 - np.eye(d))  # other coordinates: independently
    mean = np.full(n * d, 1 / n)
    return mean, (own + apart).reshape(n * d, n * d) - np.outer(mean, mean)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("uplink", ["direct", "marina", "diana"])
def test_a_partition_heats_less_than_masks_of_its_omega(
    monkeypatch: pytest.MonkeyPatch, uplink: str, equal: bool
) -> None:
    """Exact for marina and direct; for diana, which renews one memory a coordinate and round, to a tenth."""
    n, d, step, sync = 3, 2, 0.03, 0.3 if uplink == "marina" else 0.0
    roots = np.random.default_rng(1).normal(size=(1 if equal else n, d, d))
    hessians = np.repeat(roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(d), n if equal else 1, axis=0)
    centers, prior = np.random.default_rng(2).normal(size=(n, d)), 0.3 * np.eye(d)
    exact = Chain(
        hessians, centers, "langevin", uplink, step, masks=independent_pairs(d, 1 / n), sync=sync, prior=prior
    )
    monkeypatch.setattr(Chain, "bits", partition)
    forces = np.einsum("ijk,ik->ij", hessians, exact.mode - centers)
    c = (0.5 if uplink == "diana" else 1.0) / (n - 1)
    clients = hessians.sum(0)

    def spread(lag: Array) -> Array:
        each = np.einsum("ijk,kl,ilj->j", hessians, lag, hessians)
        result: Array = (1 + c) * each - c * np.einsum("jk,kl,lj->j", clients, lag, clients)
        return result

    force = (1 + c) * np.square(forces).sum(0) - c * np.square(forces.sum(0))
    described = Covariance(exact.precision, clients, n, LangevinTheory(), uplink, 1 / n, sync, force)
    heat = exact.spread() - described.coordinates(described.calm(step))
    added = described.heating(step, spread)[0]
    close = pytest.approx(heat, rel=0.1) if uplink == "diana" else pytest.approx(heat, rel=1e-4, abs=1e-9)
    assert added == close


@pytest.mark.parametrize(
    ("uplink", "low", "high"),
    [
        ({"name": "marina", "compressor": "permk"}, 0.0, 1e-6),  # equal clients: a partition loses nothing
        ({"name": "diana", "compressor": "permk"}, 0.45, 0.55),  # of what masks of the same omega add
        ({"name": "diana", "compressor": "qsgd", "levels": 15}, 0.15, 0.18),
        ({"name": "direct", "compressor": "natural"}, 0.62, 0.68),
    ],
)
def test_the_forecast_knows_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uplink: dict[str, Any], low: float, high: float
) -> None:
    """The predicted heating over that of masks with the compressor's omega, on five equal clients."""
    root = np.random.default_rng(0).normal(size=(6, 8))
    np.savez(tmp_path / "q.npz", H=np.repeat((root @ root.T / 8)[None], 5, axis=0), a=np.zeros((5, 6)))
    config = short(tmp_path / "q.npz") | {"step_size": 0.02, "uplink": uplink}
    mean = fedsample.run(config, out=tmp_path / "mean", progress="quiet").summary["predicted_mean_heating"]
    for each in (Natural, QSGD):
        monkeypatch.setattr(each, "typical", each.inclusion)
        monkeypatch.setattr(each, "noise", lambda self, squares: self.omega(len(squares)) * squares)
    monkeypatch.setattr(PermK, "independence", "independent")
    worst = fedsample.run(config, out=tmp_path / "worst", progress="quiet").summary["predicted_mean_heating"]
    assert low <= mean / worst <= high


def walk(name: str, scales: Array, rounds: int = 3000) -> tuple[Array, Array]:
    """How often each coordinate of a walk with these steps is sent, and what a memory of it lacks, in squared steps."""
    d, generator = len(scales), torch.Generator().manual_seed(3)
    compressor, links = build(name, 3), LinkKeys(0, 0, 16, "walk")
    error, sent, missing = torch.zeros(16, d, dtype=torch.float64), torch.zeros(d), torch.zeros(d, dtype=torch.float64)
    for round in range(rounds):
        error = error + torch.randn(16, d, generator=generator, dtype=torch.float64) * torch.from_numpy(scales)
        packet = compressor.compress(error, links.at(round))
        error = error - compressor.decompress(packet, d)
        if round >= 1000:
            sent += (error == 0).double().mean(0) / (rounds - 1000)
            missing += error.square().mean(0) / (rounds - 1000)
    return sent.numpy(), missing.numpy() / np.square(scales)


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_topk_lags_behind_a_walk_as_it_says(spread: float) -> None:
    """Entries are sent as often as one threshold lets them; the error's square is the lag, in squared steps."""
    scales = np.geomspace(1, spread, 24)
    sent, missing = walk("topk", scales)
    lags = build("topk", 3).lags(np.square(scales))
    assert np.square(1 - sent) / (6 * sent) == pytest.approx(lags, rel=0.25)
    assert missing == pytest.approx(lags, rel=0.25, abs=0.05)
    if spread == 1.0:
        assert lags == pytest.approx(np.full(24, 1 / build("topk", 3).typical(24) - 1), rel=1e-6)


def test_topk_lags_behind_nothing_that_stands_still() -> None:
    lags = build("topk", 3).lags(np.array([1.0, 0.0, 2.0, 1.0, 1.0]))
    assert lags[1] == 0
    assert (lags[[0, 2, 3, 4]] > 0).all()
    assert not build("topk", 3).lags(np.array([1.0, 0.0, 2.0, 0.0])).any()
    assert build("topk+bf16", 3).lags(np.ones(9)) == pytest.approx(build("topk", 3).lags(np.ones(9)), rel=1e-4)


@pytest.mark.parametrize(("link", "sampler"), [("uplink", "langevin"), ("downlink", "langevin"), ("uplink", "baoab")])
def test_the_forecast_knows_what_topk_leaves(tmp_path: Path, link: str, sampler: str) -> None:
    """Against the variance of 192 chains, of which masks of the same alpha would add eleven times as much."""
    np.savez(tmp_path / "q.npz", H=np.eye(40)[None], a=np.zeros((1, 40)))
    compressed = {"compressor": "topk", "k": 0.05}
    config = {
        "data": {"kind": "quadratic", "file": str(tmp_path / "q.npz")},
        "dtype": "float64",
        "chains": 192,
        "rounds": 450,
        "warmup": 150,
        "thin": 10,
        "start": {"scale": 1.0},
        "step_size": 0.03,
        "sampler": {"name": sampler},
        "metric": {"name": "identity"},
        "uplink": {"name": "ef21", **compressed} if link == "uplink" else {"name": "dense", "compressor": "identity"},
        "downlink": {"name": "dense"} if link == "uplink" else {"name": "ef21-p", **compressed},
        "monitor": {"tensorboard": False},
    }
    run = fedsample.run(config, out=tmp_path / "run", progress="quiet")
    measured = float(run.draws.double().square().mean()) - 1
    assert run.summary["predicted_mean_bias"] == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("arrive", [0.4, 0.7])
@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.05), ("baoab", 0.1)])
def test_a_coordinate_of_unequal_clients_that_are_sampled(sampler: Any, step: float, arrive: float) -> None:
    """The memories of clients with most curvature lag most: knowing that, the heating is right to 8 %."""
    lam = np.array([0.02, 0.05, 0.13, 0.8])
    exact = coordinate(lam, np.zeros(4), sampler, "diana", step, keep=0.25, arrive=arrive, friction=1.0)
    cubes, squares = (lam**3).sum(), float((lam**2).sum())
    plain = Coordinate(theory(sampler), "diana", 1.0, squares, 0.25, 4, 0.25, arrive)
    described = replace(plain, concentration=4 * cubes / squares)
    calm = plain.exact().bias(step)
    heat = exact.spread()[0] - 1 - calm
    assert described.bias(step) - calm == pytest.approx(heat, rel=0.08)
    assert plain.bias(step) - calm < 0.85 * heat


def test_a_column_that_hardly_moves_does_not_count_for_all_others() -> None:
    """Its own memory lags by t^2 / s^2 rounds, which have no bound as its steps s go to zero."""
    mixing = np.array([0.0, 1e-31, 1e-6, 0.1, 0.2, 0.1, 0.3, 0.1])
    compressor = build("topk", 2)
    few = _weighted(compressor, LangevinTheory(), mixing[3:], np.sqrt(mixing[3:]))
    assert compressor.inclusion(8) < _weighted(compressor, LangevinTheory(), mixing, np.sqrt(mixing)) < 2 * few


def test_the_step_under_client_sampling_knows_whose_noise_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    roots = generator.normal(size=(5, 8, 9)) * np.sqrt(np.geomspace(0.02, 2, 5))[:, None, None]
    np.savez(tmp_path / "q.npz", H=roots @ roots.swapaxes(1, 2), a=generator.normal(size=(5, 8)))
    config = short(tmp_path / "q.npz") | {
        "sampler": {"name": "langevin"},
        "uplink": {"name": "diana", "compressor": "randk", "k": 0.25},
        "fleet": {"participation": 2},
    }
    told = fedsample.run(config, out=tmp_path / "told", progress="quiet").summary["step_size"]
    monkeypatch.setattr(GeometryProbe, "concentration", lambda self: torch.ones(8, dtype=torch.float64))
    blind = fedsample.run(config, out=tmp_path / "blind", progress="quiet").summary["step_size"]
    assert told < 0.95 * blind


@pytest.mark.parametrize("sampler", ["langevin", "baoab"])
def test_the_largest_stable_step_of_unequal_clients(sampler: Any) -> None:
    """Whoever has most curvature sets it: without that it is said a quarter too large and more."""
    lam = np.array([0.02, 0.05, 0.13, 0.8])
    exact = coordinate(lam, np.zeros(4), sampler, "diana", 0.01, keep=0.25, friction=1.0).limit()
    plain = Coordinate(theory(sampler), "diana", 1.0, float((lam**2).sum()), 0.25, 4, 0.25)
    told = replace(plain, concentration=4 * float((lam**3).sum() / (lam**2).sum()))
    assert told.limit() == pytest.approx(exact, rel=0.03)
    assert plain.limit() > 1.25 * exact
