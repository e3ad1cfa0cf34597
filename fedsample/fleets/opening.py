"""How a run gets clients that are not in its process: who opens a fleet, and what the run lends for it."""

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
    """What a run lends to whoever opens its fleet."""

    @property
    def experiment(self) -> Experiment:
        """What is to be sampled."""
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
        """Whether the run has once ended, and has no further rounds to do."""
        ...

    @property
    def stopped(self) -> str | None:
        """The name of the signal that asked the run to end."""
        ...

    def accept(self, problem: Problem) -> Links:
        """Take what is sampled -> the run's links.

        Raises:
            FedSampleError: if the settings do not fit the number of parameters or of clients.
        """
        ...


Opener = Callable[[Opening, Progress, ExitStack], tuple[Problem, Fleet]]
