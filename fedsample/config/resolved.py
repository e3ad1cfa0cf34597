"""An experiment with every automatic choice made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsample.config.experiment import Experiment
from fedsample.config.sections import ScheduleConfig


@dataclass(frozen=True)
class Resolved:
    """The choices of a run, made once before its first round and stored in its config.toml.

    Attributes:
        experiment: the experiment with the choices below in place of "auto".
        engine: the engine that computes gradients; None if clients are not in this process.
        threads: CPU threads of the chain.
        step_size: h > 0, the step of round 1.
    """

    experiment: Experiment
    engine: str | None
    threads: int
    step_size: float

    @classmethod
    def of(cls, asked: Experiment, engine: str | None, threads: int, step_size: float) -> Resolved:
        """Put the choices into the experiment that was asked for."""
        section = asked.step_size
        step = section.model_copy(update={"initial": step_size}) if isinstance(section, ScheduleConfig) else step_size
        chosen = with_values(asked, fleet=_fleet(engine, threads), step_size=step)
        return cls(chosen, engine, threads, step_size)


def on_machine(asked: Experiment, engine: str | None, threads: int) -> Experiment:
    """The experiment with the choices made before the step size, for preparation."""
    return with_values(asked, fleet=_fleet(engine, threads))


def with_values(experiment: Experiment, **changes: Any) -> Experiment:
    """Copy an experiment with other values; give sections as a dict of keys."""
    values = {
        name: getattr(experiment, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return experiment.model_copy(update=values)


def _fleet(engine: str | None, threads: int) -> dict[str, Any]:
    return {"threads": threads} if engine is None else {"threads": threads, "engine": engine}
