"""Hubs and certificates that several files of this folder use."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_by_hand import Chain
from made_certificates import NAMES

from fedsample.fleets.grpc.security import cert_folders
from fedsample.fleets.grpc.server import hub as hubs


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Chain]]:
    monkeypatch.setattr(hubs, "COMPLAIN", 0.5)
    made: list[Chain] = []

    def make(devices: int) -> Chain:
        made.append(Chain(devices))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet of two, never changed; tests that break something copy it."""
    folder = tmp_path_factory.mktemp("fleet") / "certs"
    cert_folders.init(folder, NAMES, 2)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "certs")
    return tmp_path / "certs"
