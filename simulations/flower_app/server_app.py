"""The server: finds the mode and the metric over Flower messages, then samples with `strategy.start`."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedsample.config import dump_toml
from fedsample.config.loading import of_run_config
from fedsample.estimators import build_links
from fedsample.fleets.flower.fleet import fleet_on
from fedsample.monitor.draws import DrawStore
from fedsample.monitor.progress import Progress
from fedsample.preparation.prepare import prepare
from fedsample.problem import build_problem
from fedsample.runs.build import build_driver
from fedsample.runs.checks import check
from fedsample.runs.session import SHARD_ROUNDS
from fedsample.strategies.flower import FlowerStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare, sample, and save the draws."""
    experiment = of_run_config(context.run_config)
    check(experiment)
    out = Path(str(context.run_config["app.out"])).resolve()
    draws = DrawStore(out / "draws", SHARD_ROUNDS, start=experiment.warmup)

    problem = build_problem(experiment)  # for the prior and the number of parameters: the rows stay with the clients
    links = build_links(experiment, problem.clients)
    fleet = fleet_on(grid, experiment, problem.clients, links)
    prepared = prepare(experiment, problem, links, fleet, Progress(experiment.rounds, mode="plain"))
    strategy = FlowerStrategy(build_driver(experiment, problem, links, prepared, fleet.n))
    strategy.use(fleet)

    def keep(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        kept = server_round - experiment.warmup
        if kept > 0 and kept % experiment.thin == 0:
            draws.append(server_round, strategy.draw(strategy.state_of(arrays)))
        return None

    strategy.start(
        grid,
        strategy.arrays(strategy.begin(prepared.start)),
        num_rounds=experiment.rounds,
        train_config=ConfigRecord({"observe-every": experiment.monitor.every}),
        evaluate_fn=keep,
    )
    draws.flush()
    (out / "config.toml").write_text(dump_toml(experiment), encoding="utf-8")
    before = prepared.geometry.traffic
    total = before.plus(strategy.traffic)
    summary = {
        "preset": experiment.preset,
        "rounds": experiment.rounds,
        "draws": experiment.draws,
        "chains": experiment.chains,
        "clients": fleet.n,
        "params": problem.d,
        "step_size": prepared.step_size,
        "uplink_bytes_per_client": total.up / 8 / fleet.n,
        "downlink_bytes_per_client": total.down / 8 / fleet.n,
        "preparation_uplink_bytes_per_client": before.up / 8 / fleet.n,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{experiment.draws} draws of {experiment.chains} chains lie in {out}")
