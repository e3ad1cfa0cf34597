"""Interface between a run and whatever opens its fleet of clients in other processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from fedsample.config import Experiment
from fedsample.estimators import Links
from fedsample.monitor.directory import RunDirectory
from fedsample.monitor.progress import Progress
from fedsample.problem import Problem
from fedsample.protocol.exchange import Fleet


class Opening(Protocol):
    """What a run offers to whoever opens its fleet."""

    @property
    def experiment(self) -> Experiment:
        """The configuration."""
        ...

    @property
    def path(self) -> Path:
        """The run directory."""
        ...

    @property
    def directory(self) -> RunDirectory:
        """The run directory, locked."""
        ...

    @property
    def over(self) -> bool:
        """Whether the run has ended before and has no rounds left."""
        ...

    @property
    def stopped(self) -> str | None:
        """The name of the signal that asked the run to end; None: none did."""
        ...

    def accept(self, problem: Problem) -> Links:
        """Take the problem -> the run's links.

        Raises:
            FedSampleError: if the settings do not fit the number of parameters or of clients.
        """
        ...


Opener = Callable[[Opening, Progress, ExitStack], tuple[Problem, Fleet]]
