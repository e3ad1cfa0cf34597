"""Engines: the same draws, masks and coins on every path to the gradients, what is chosen, and what is stored of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedsample
from fedsample.errors import CompileError
from fedsample.fleets.engines import Engine, by_shape, choose_engine
from fedsample.models import lenet
from fedsample.random import key
from fedsample.targets import Clients, GeneralizedLinear, ModuleClients, Quadratic, fused, module
from fedsample.targets import glm as glm_file

FAST: tuple[Engine, ...] = ("batched", "stacked", "compiled")
OFFSETS = (0, 9, 9, 10, 40, 70, 100)  # 9, 0, 1 and three times 30 rows


def regression(likelihood: Any, q: int, dtype: torch.dtype = torch.float64) -> GeneralizedLinear:
    keys = key(5, purpose="rows")
    x = keys.normal(OFFSETS[-1] * q, dtype).view(-1, q)
    y = keys.fold("y").bernoulli(0.4, OFFSETS[-1]).to(dtype)
    return GeneralizedLinear(x, y, torch.tensor(OFFSETS), likelihood, intercept=False, noise_scale=0.7)


def points(q: int, dtype: torch.dtype = torch.float64, chains: int = 3) -> Tensor:
    return key(6, chain=torch.arange(chains), purpose="points").normal(q, dtype)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [1, 7, 8, 16, 33, 123])
def test_paths_give_the_same_gradients(likelihood: Any, dtype: torch.dtype, q: int) -> None:
    """They add the same products in other orders: some last bits of the largest term of a sum of 30."""
    clients = regression(likelihood, q, dtype)
    want = clients.gradient(points(q, dtype))
    scale = float(want.abs().max())
    for engine in FAST:
        path = clients.on(engine)
        found = path.gradient(points(q, dtype))
        assert found.shape == want.shape
        assert float((found - want).abs().max()) <= 32 * torch.finfo(dtype).eps * scale, engine
        some = torch.tensor([4, 0, 1])
        part = path.gradient(points(q, dtype), clients=some)
        assert float((part - want[some]).abs().max()) <= 32 * torch.finfo(dtype).eps * scale, engine


def test_runs_follow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the clients are cut into runs, even or ragged, every client's gradient is there."""
    clients = regression("bernoulli", 7)
    want = clients.gradient(points(7))
    for rows in (1, 30, 60, 1000):
        monkeypatch.setattr(glm_file, "_CACHED", rows * 7 * 8)
        assert torch.allclose(clients.on("stacked").gradient(points(7)), want, rtol=1e-12, atol=1e-12)
    softmax = GeneralizedLinear(clients.design, clients.labels.long() + 1, clients.offsets, "categorical", 3)
    monkeypatch.setattr(glm_file, "_CACHED", 60 * 8 * 8)
    at = points(softmax.d)
    assert torch.allclose(softmax.on("stacked").gradient(at), softmax.gradient(at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_logits_of_any_size(dtype: torch.dtype) -> None:
    """The sigmoid is its own: exact far out, no overflow, and NaN stays NaN."""
    eta = torch.tensor(
        [-1e30, -800.0, -90.0, -20.0, -1.0, 1e-3, 0.5, 16.0, 90.0, 800.0, 1e30, float("nan")], dtype=dtype
    )
    n = len(eta)
    clients = GeneralizedLinear(
        eta.unsqueeze(1), torch.zeros(n, dtype=dtype), torch.arange(n + 1), "bernoulli", intercept=False
    ).on("compiled")
    found = clients.gradient(torch.ones(1, 1, dtype=dtype))[:, 0, 0] / eta
    finite = eta.abs() < 1e3
    small = torch.finfo(dtype).tiny
    assert torch.allclose(found[finite], torch.sigmoid(eta[finite]), rtol=4 * torch.finfo(dtype).eps, atol=2 * small)
    assert found[-2] == 1
    assert abs(float(found[0])) < 4 * small
    assert found[-1].isnan()


def test_threads_change_no_bit_of_compiled_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_SHARE", 1)
    clients = regression("bernoulli", 33, torch.float32).on("compiled")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(clients.gradient(points(33, torch.float32)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("batch_size", [None, 20])
def test_a_network_computed_alone_or_among_others(batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain reverse mode and `vmap` give the same gradients to float32's rounding, for all clients and for some."""
    net = lenet.LeNet5((28, 28), 10)
    keys = key(7, purpose="images")
    x = keys.normal(90 * 28 * 28, torch.float32).view(-1, 28, 28)
    clients = ModuleClients(net, x, keys.fold("y").integers(10, 90), torch.tensor([0, 25, 25, 60, 90]), "categorical")
    theta = 0.05 * keys.fold("theta").normal(2 * clients.d, torch.float32).view(2, -1)
    who = torch.tensor([3, 0, 1])
    draws = key(8, client=who.unsqueeze(-1), chain=torch.arange(2), purpose="batch")
    found = []
    for alone in (1, 1 << 60):
        monkeypatch.setattr(module, "_ALONE", alone)
        found.append(clients.gradient(theta, clients=who, keys=draws, batch_size=batch_size))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))
    assert float(found[0][2].abs().max()) == 0  # the client without rows


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_the_table_goes_by_shapes() -> None:
    large = GeneralizedLinear(torch.zeros(300_000, 1), torch.zeros(300_000), torch.tensor([0, 9, 300_000]), "gaussian")
    assert by_shape(large, None) == "stacked"
    assert by_shape(large, 32) == "batched"
    assert by_shape(regression("bernoulli", 3), None) == "batched"
    quadratic = Quadratic(torch.ones(2, 3), torch.zeros(2, 3))
    assert choose_engine(quadratic, "auto", chains=1) == "batched"
    for name in ("batched", "stacked", "by-client"):
        assert choose_engine(large, name, chains=1, tune=True) == name  # type: ignore[arg-type]


def test_a_stopwatch_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one path is slower than all others it is not chosen; without `tune` nobody looks."""
    clients, asked = regression("bernoulli", 3), []
    original = GeneralizedLinear.gradient

    def slow(self: GeneralizedLinear, theta: Tensor, **more: Any) -> Tensor:
        asked.append(self)
        if self._runs is None:
            for _ in range(200):
                original(self, theta, **more)
        return original(self, theta, **more)

    monkeypatch.setattr(GeneralizedLinear, "gradient", slow)
    assert choose_engine(clients, "auto", chains=2) == "batched"
    assert not asked
    assert choose_engine(clients, "auto", chains=2, tune=True) == "stacked"
    assert choose_engine(Quadratic(torch.ones(2, 3), torch.zeros(2, 3)), "auto", chains=1, tune=True) in FAST


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "false --and-why")
    fused.library.cache_clear()
    yield
    fused.library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_next_engine_runs_and_one_warning_says_why() -> None:
    clients = regression("bernoulli", 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose_engine(clients, "compiled", chains=1) == "batched"
    assert len(caught) == 1
    assert 'fleet.engine = "compiled" is not possible, "batched" is used: false fails' in str(caught[0].message)
    with pytest.raises(CompileError, match="false fails"):
        clients.on(choose_engine(clients, "compiled", chains=1, strict=True))


def test_compilers_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(CompileError, match="cannot be used"):
        fused.library.__wrapped__()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"no C\+\+ compiler was found; install"):
        fused.library.__wrapped__()


@pytest.mark.parametrize("clients", [Quadratic(torch.ones(2, 3), torch.zeros(2, 3)), "softmax"], ids=["quadratic", "k"])
def test_what_is_not_compiled_says_so(clients: Clients | str) -> None:
    if isinstance(clients, str):
        clients = GeneralizedLinear(
            torch.ones(4, 2), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 4]), "categorical", 3
        )
    with pytest.raises(CompileError, match="only linear and logistic clients on a CPU are compiled"):
        clients.on("compiled")
    with pytest.warns(UserWarning, match="only linear and logistic"):
        assert choose_engine(clients, "compiled", chains=1) == "batched"


def test_a_run_stores_its_engine_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the table would now say something else; and not without its compiler."""
    settings = {
        "preset": "langevin-marina",
        "rounds": 40,
        "warmup": 0,
        "thin": 1,
        "chains": 1,
        "step_size": 1e-3,
        "data": {"name": "breast_cancer", "clients": 3},
        "model": {"name": "logistic"},
    }
    plain = fedsample.run({**settings, "rounds": 80}, out=tmp_path / "auto", progress="quiet")
    assert plain.experiment.fleet.engine == "batched"
    assert 'engine = "batched"' in (plain.path / "config.toml").read_text()
    compiled = {**settings, "fleet": {"engine": "compiled"}}
    whole = fedsample.run({**compiled, "rounds": 80}, out=tmp_path / "whole", progress="quiet")
    part = fedsample.run(compiled, out=tmp_path / "part", progress="quiet")
    config = part.path / "config.toml"
    assert 'engine = "compiled"' in config.read_text()
    config.write_text(config.read_text().replace("rounds = 40", "rounds = 80"))
    resumed = fedsample.run(out=part.path, resume=True, progress="quiet")
    assert torch.equal(resumed.draws, whole.draws)
    config.write_text(config.read_text().replace("rounds = 80", "rounds = 90"))
    monkeypatch.setenv("CXX", "false")
    fused.library.cache_clear()
    with pytest.raises(CompileError, match="false fails"):
        fedsample.run(out=part.path, resume=True, progress="quiet")
    fused.library.cache_clear()
