"""Apps from before flwr.serverapp on our Grid, and the range of Flower's versions."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from grid_apps import client, grid_of
from rounding import agree

from fedsample.errors import ConfigError, QuorumError
from fedsample.fleets.flower_grid import run_flower, versions

# --- apps from before flwr.serverapp ----------------------------------------------------------------------------------


def legacy(clients: int, wanted: int, **options: Any) -> Any:
    from flwr.client import NumPyClient
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg as Old

    class Numpy(NumPyClient):
        def __init__(self, place: int) -> None:
            self.place = place

        def get_parameters(self, config: Any) -> Any:
            return [np.zeros(3)]

        def fit(self, parameters: Any, config: Any) -> Any:
            return [parameters[0] + self.place], self.place, {}

        def evaluate(self, parameters: Any, config: Any) -> Any:
            return float(parameters[0].sum()), 1, {}

    kept: dict[str, Any] = {"fit": None}

    class Keeping(Old):
        def aggregate_fit(self, *arguments: Any) -> Any:
            kept["fit"], metrics = super().aggregate_fit(*arguments)
            return kept["fit"], metrics

    def parts(context: Context) -> ServerAppComponents:
        strategy = Keeping(**{"min_available_clients": wanted, "min_fit_clients": wanted} | options)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    app = ClientApp(client_fn=lambda context: Numpy(int(context.node_config["partition-id"])).to_client())
    run_flower(ServerApp(server_fn=parts), app, clients)
    return kept["fit"]


def test_an_app_of_old_runs() -> None:
    from flwr.common import parameters_to_ndarrays

    (weights,) = parameters_to_ndarrays(legacy(4, 4))
    agree(weights, np.full_like(weights, 2 * (0 + 1 + 4 + 9) / 6), 16)


def test_an_old_strategy_that_wants_more_nodes_than_there_are() -> None:
    with pytest.raises(QuorumError, match="waits for 5 nodes, and there are 3"):
        legacy(3, 5)


def test_an_old_strategy_that_samples_by_position() -> None:
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.compat.app_utils import start_update_client_manager_thread

    with grid_of(client()) as grid:
        manager = SimpleClientManager()
        thread, stop, ready = start_update_client_manager_thread(grid, manager)
        ready.wait(10)
        stop.set()
        with pytest.raises(QuorumError, match="waits for 5 nodes, and there are 3"):
            manager.sample(5)
        with pytest.raises(QuorumError, match="waits for 4 nodes, and there are 3"):
            manager.sample(2, 4)
        assert (len(manager.sample(2, 3)), len(manager.sample(3))) == (2, 3)
        thread.join(10)


def test_an_old_strategy_that_waits_for_fewer_nodes_than_it_samples_goes_on_without() -> None:
    assert legacy(3, 2, min_fit_clients=5) is None


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.40.9", "1.43.0", "2.0", "0.9", "strange"])
def test_versions_that_are_not_known_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(versions.UNCHECKED, raising=False)
    with pytest.raises(ConfigError, match=r"1\.41 up to, not including, 1\.43; pip install 'flwr>=1\.41,<1\.43'"):
        versions.check(version)
    monkeypatch.setenv(versions.UNCHECKED, "1")
    versions.check(version)


def test_known_versions_are_those_of_the_package() -> None:
    for version in ("1.41.0", "1.42.3"):
        versions.check(version)
    file = Path(__file__).parents[3] / "pyproject.toml"
    needs = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    oldest, newest = (".".join(map(str, each)) for each in (versions.OLDEST, versions.NEWEST))
    assert f"flwr>={oldest},<{newest}" in needs
