"""Devices that hold their own rows: sums and options that make no sense, and what is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_rows import experiment, read_device, total
from rounding import agree, gamma, near

from fedsample.data import FederatedData
from fedsample.data import load as load_data
from fedsample.data.standardize import Scale, first_sums, second_sums
from fedsample.errors import ConfigError, DataError


def test_sums_by_hand() -> None:
    shares = [(np.array([[1e9, 3.0, 0.1]]), np.array([0.5])), (np.zeros((0, 3)), np.zeros(0))]
    shares.append((np.array([[1e9 + 2, 4.0, 0.1], [1e9 + 4, 8.0, 0.1]]), np.array([1.5, 4.0])))
    x, y = (np.concatenate(each) for each in zip(*shares, strict=True))
    data = FederatedData("some", x, y, np.array([0, 1, 1, 3]), x[:0], y[:0], None)
    parts = [data.client(i) for i in range(3)]
    first = total([first_sums(part) for part in parts])
    assert first.tolist() == [3.0, 3e9 + 6, 15.0, near(0.3, 4), 6.0]
    second = total([second_sums(part, first) for part in parts])
    assert second.tolist() == [8.0, 14.0, pytest.approx(0, abs=3 * (2 * gamma(4) * 0.1) ** 2), 6.5]
    scaled = Scale.of(first, second).apply(data)
    agree(scaled.x[:, 0], np.array([-2, 0, 2]) / np.sqrt(8 / 3), 4)
    assert np.abs(scaled.x[:, 2]).max() <= 2 * gamma(4) * 0.1  # constant but for rounding: not blown up
    assert (scaled.target_mean, scaled.target_scale) == (2.0, np.sqrt(6.5 / 3))
    nobody = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(DataError, match="0 training rows"):
        second_sums(parts[1], nobody)


def test_sums_of_strangers() -> None:
    data = load_data(experiment(data={"name": "iris", "clients": 2}).data, 0)
    first = first_sums(data.client(0))
    for bad in (first[1:], torch.cat([torch.zeros(1), first[1:]]), first * torch.nan, first + 0.5):
        with pytest.raises(DataError, match=r"first sums|training rows together"):
            second_sums(data.client(0), bad)
    for second in (-torch.ones(4).double(), torch.full((4,), torch.inf).double()):
        with pytest.raises(DataError, match="sums of squares"):
            Scale.of(first, second)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--data FILE"),
        ({"data": "digits"}, "--partition and --partitions"),
        ({"data": "digits", "partition": 3, "partitions": 3}, "clients 0 to 2"),
        ({"data": "digits", "partition": -1, "partitions": 3}, "at least 0"),
        ({"data": "digits", "partition": 0, "partitions": 3, "target": "y"}, "--target y"),
        ({"data": "digit"}, "Did you mean 'digits'"),
        ({"data": "own.npz", "partition": 0}, "all rows of own.npz are this device's"),
        ({"data": "own.npz", "target": "y"}, "--target y"),
        ({"partition": 0, "partitions": 4}, "data.clients = 10"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", X=np.zeros((4, 1)), y=[0, 1, 0, 1])
    with pytest.raises(ConfigError, match=message):
        read_device(experiment(), 0, **given)


def test_files_that_cannot_be_this_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", X=np.zeros((4, 1)), y=[0, 1, 0, 1], client=[0, 1, 0, 1])
    np.savez("q.npz", lam=np.ones((2, 3)), a=np.ones((2, 3)))
    with pytest.raises(DataError, match="drop 'client'"):
        read_device(experiment(), 0, data="own.npz")
    with pytest.raises(DataError, match="does not exist"):
        read_device(experiment(), 0, data="no.csv")
    with pytest.raises(DataError, match="no array 'X'"):
        read_device(experiment(), 0, data="q.npz")
    settings = experiment(data={"kind": "quadratic", "file": "q.npz"})
    with pytest.raises(DataError, match="expected 'a'"):
        read_device(settings, 0, data="own.npz")
    with pytest.raises(ConfigError, match="clients 0 to 1"):
        read_device(settings, 0, partition=2)
    with pytest.raises(ConfigError, match="holds 2 potentials"):
        read_device(settings, 0, data="q.npz")


def test_a_device_with_a_file_needs_little(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("a,b,y\n" + "".join(f"{i},{'uv'[i % 2]},{i % 3}\n" for i in range(12)))
    script = """
import sys
from fedsample.config import load
from fedsample.data.device_files import agreed_schema, read_device
from fedsample.data.standardize import Scale, first_sums, second_sums
from fedsample.diagnostics.counts import Evaluator
from fedsample.problem.remote import device_problem, remote_problem
settings = load({}, environment={})
holding = read_device(settings, 0, task=None, data="own.csv", target="y")
agreed = agreed_schema(settings, [holding.schema])
share = holding.fit(agreed)
first = first_sums(share)
share = Scale.of(first, second_sums(share, first)).apply(share)
problem = device_problem(settings, share)
theta = problem.start_mean.to(problem.clients.dtype).unsqueeze(0)
problem.clients.gradient(theta)
evaluator = Evaluator(problem)
evaluator.see(theta)
evaluator.counts()
remote_problem(settings, agreed, 3)
heavy = {"flwr", "ray", "opacus", "tensorboard", "sklearn", "datasets", "flwr_datasets", "scipy"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
