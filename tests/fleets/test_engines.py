"""Engines: the same draws, masks and coins on every path to the gradients, what is chosen, and what is stored of it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processors import runs_code_for
from rounding import ELEMENTARY, assert_within, gamma
from running_error import RunningError, assert_same_in_norm
from torch import Tensor

import fedsample
from fedsample.config import load
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


@pytest.mark.rounding
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [1, 7, 8, 16, 33, 123])
def test_paths_give_the_same_gradients(likelihood: Any, dtype: torch.dtype, q: int) -> None:
    """They add the same products in other orders; a dropped row or feature is seen."""
    compare_paths(likelihood, q, dtype)


def compare_paths(likelihood: Any, q: int, dtype: torch.dtype) -> None:
    clients, at = regression(likelihood, q, dtype), points(q, dtype)
    with RunningError() as analysis:
        want = clients.gradient(at)
    bound = 2 * analysis.error(want)  # of each path, whose own exp is no worse than `ELEMENTARY`
    for engine in FAST:
        path = clients.on(engine)
        assert_within(path.gradient(at), want, bound, what=engine)
        some = torch.tensor([4, 0, 1])
        assert_within(path.gradient(at, clients=some), want[some], bound[some], what=engine)
    for short in (clients.offsets - (clients.offsets == 70).long(), clients.offsets - (clients.offsets == 9).long()):
        mutant = GeneralizedLinear(
            clients.design, clients.labels, short, likelihood, intercept=False, noise_scale=0.7
        )  # a client has lost its last row to the next
        with pytest.raises(AssertionError, match="differ by more"):
            assert_within(mutant.on("compiled").gradient(at), want, bound)
    with pytest.raises(AssertionError, match="differ by more"):  # the last feature weighs a thousandth more
        assert_within(
            clients.on("compiled").gradient(at * torch.cat([torch.ones(q - 1), torch.tensor([1.001])])), want, bound
        )


@pytest.mark.rounding
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_code_made_for_other_processors_gives_the_same_gradients(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors are as wide as ever, made of narrower ones; products and sums are fused or not."""
    if platform.machine() != "x86_64" or not runs_code_for(level):
        pytest.skip(f"this processor does not run code for {level}")
    monkeypatch.setenv("FEDSAMPLE_CXXFLAGS", f"-O3 -march={level}")
    fused.library.cache_clear()
    try:
        for dtype in (torch.float32, torch.float64):
            for q in (7, 33):
                compare_paths("bernoulli", q, dtype)
                compare_paths("gaussian", q, dtype)
    finally:
        fused.library.cache_clear()


def test_runs_follow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the clients are cut into runs, even or ragged, every client's gradient is there."""
    clients = regression("bernoulli", 7)
    softmax = GeneralizedLinear(clients.design, clients.labels.long() + 1, clients.offsets, "categorical", 3)
    with RunningError() as analysis:
        want = clients.gradient(points(7))
        for rows in (1, 30, 60, 1000):
            monkeypatch.setattr(glm_file, "_CACHED", rows * 7 * 8)
            analysis.close(clients.on("stacked").gradient(points(7)), want)
        monkeypatch.setattr(glm_file, "_CACHED", 60 * 8 * 8)
        at = points(softmax.d)
        analysis.close(softmax.on("stacked").gradient(at), softmax.gradient(at))


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
    want = torch.sigmoid(eta[finite].double())
    # a sigmoid, the product with eta and the division by it; exp is cut off where what it adds is subnormal
    assert_within(found[finite], want, gamma(ELEMENTARY + 2 + 2, dtype) * want + 2 * small)
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


@pytest.mark.rounding
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

    def computed(alone: int) -> Tensor:
        monkeypatch.setattr(module, "_ALONE", alone)
        return clients.gradient(theta, clients=who, keys=draws, batch_size=batch_size)

    found = assert_same_in_norm(lambda: computed(1), lambda: computed(1 << 60), leading=2, responses=1)
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


def test_flags_that_the_compiler_or_the_shell_would_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSAMPLE_CXXFLAGS", "-O1 -march=pdp-11")
    with pytest.raises(CompileError, match=r"fails: .*pdp-11"):
        fused.library.__wrapped__()
    monkeypatch.setenv("FEDSAMPLE_CXXFLAGS", "-O1 'open")
    with pytest.raises(CompileError, match=r"FEDSAMPLE_CXXFLAGS = .* cannot be read as a shell would"):
        fused.library.__wrapped__()


def test_flags_replace_what_the_code_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come after what the code means, and no setting of a run is looked for in them."""
    monkeypatch.setenv("FEDSAMPLE_CXXFLAGS", "-O2 -march=x86-64-v2")
    assert load({}).seed == 0
    seen: list[list[str]] = []

    def run(command: list[str], **more: Any) -> Any:
        seen.append(command)
        raise OSError("not called")

    monkeypatch.setattr(fused.subprocess, "run", run)
    with pytest.raises(CompileError, match="not called"):
        fused.library.__wrapped__()
    monkeypatch.delenv("FEDSAMPLE_CXXFLAGS")
    with pytest.raises(CompileError, match="not called"):
        fused.library.__wrapped__()
    ours, default = ([word for word in command if word.startswith(("-O", "-m"))] for command in seen)
    assert ours == ["-O2", "-march=x86-64-v2"]
    assert default == ["-O3", "-march=native"]
    assert all("-std=c++17" in command and "-fPIC" in command for command in seen)


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
