"""An experiment in which nothing is left open any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsample.config.experiment import Experiment
from fedsample.config.sections import ScheduleConfig


@dataclass(frozen=True)
class Resolved:
    """What a run goes by from its first round on, and what its config.toml holds; made once.

    Attributes:
        experiment: with the choices below in place of "auto".
        engine: the path to the gradients; None where clients are not in this process.
        threads: CPU threads of the chain.
        step_size: h > 0, the step of round 1.
    """

    experiment: Experiment
    engine: str | None
    threads: int
    step_size: float

    @classmethod
    def of(cls, asked: Experiment, engine: str | None, threads: int, step_size: float) -> Resolved:
        """The experiment that was asked for, with what was chosen."""
        section = asked.step_size
        step = section.model_copy(update={"initial": step_size}) if isinstance(section, ScheduleConfig) else step_size
        chosen = with_values(asked, fleet=_fleet(engine, threads), step_size=step)
        return cls(chosen, engine, threads, step_size)


def on_machine(asked: Experiment, engine: str | None, threads: int) -> Experiment:
    """The experiment with the choices that are made before its step: what preparation is done for."""
    return with_values(asked, fleet=_fleet(engine, threads))


def with_values(experiment: Experiment, **changes: Any) -> Experiment:
    """The same experiment with other values; sections take a dict of keys."""
    values = {
        name: getattr(experiment, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return experiment.model_copy(update=values)


def _fleet(engine: str | None, threads: int) -> dict[str, Any]:
    return {"threads": threads} if engine is None else {"threads": threads, "engine": engine}
