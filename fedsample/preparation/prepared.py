"""The results of preparation, and how a run directory keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.errors import RunDirectoryError
from fedsample.preparation.curvature import Geometry
from fedsample.preparation.step_rule import (
    Forecast,
)
from fedsample.protocol.exchange import Traffic
from fedsample.targets.metric import restore

if TYPE_CHECKING:
    pass

_TENSORS, _NUMBERS = "geometry.safetensors", "geometry.json"
_MEASURED = ("curvature", "flattest", "mean_curvature", "share", "exchanges")


@dataclass(frozen=True)
class Prepared:
    """The results of preparation.

    Attributes:
        geometry: metric and curvature.
        forecast: the step, and its predicted bias.
        start: (C, d) starting points in the metric's coordinates.
        radius: see `Stability`.
    """

    geometry: Geometry
    forecast: Forecast
    start: Tensor
    radius: float

    @property
    def step_size(self) -> float:
        """The first step."""
        return self.forecast.step_size

    def save(self, path: Path, configurations: Sequence[str] = ()) -> None:
        """Store it beside the run's configuration.

        Args:
            path: the run directory.
            configurations: digests of the configurations that it holds for, see `prepared_for`.
        """
        from safetensors.torch import save

        from fedsample.monitor.atomic_files import write_atomic

        metric = self.geometry.metric
        tensors = {
            "mean": metric.mean,
            "mixing": self.geometry.mixing,
            "gradient": self.geometry.gradient,
            "force": self.geometry.force,
            "stiffest": self.geometry.stiffest,
            "start": self.start,
            **metric.tensors(),
        }
        data = save({name: each.cpu().contiguous() for name, each in tensors.items()})
        (path / _NUMBERS).unlink(missing_ok=True)  # an earlier attempt's: the two files belong together
        write_atomic(path / _TENSORS, data)
        numbers: dict[str, Any] = {
            "metric": metric.name,
            "radius": self.radius,
            **asdict(self.forecast),
            **{name: getattr(self.geometry, name) for name in _MEASURED},
            "traffic": list(self.geometry.traffic),
            "configurations": list(configurations),
        }
        numbers["sha256"] = _checksum(numbers, data)
        write_atomic(path / _NUMBERS, json.dumps(numbers, indent=1).encode())


def _checksum(numbers: dict[str, Any], tensors: bytes) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode() + tensors).hexdigest()


def prepared_for(path: Path, configuration: str) -> bool:
    """Whether a run directory holds a preparation, whole or damaged, from the configuration with this digest."""
    try:
        return configuration in json.loads((path / _NUMBERS).read_bytes())["configurations"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def restore_prepared(path: Path, device: str) -> Prepared:
    """Read what `Prepared.save` stored in a run directory.

    Args:
        path: the run directory.
        device: where to put the tensors.

    Raises:
        RunDirectoryError: if it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    place = torch.device(device)
    try:
        data, n = (path / _TENSORS).read_bytes(), json.loads((path / _NUMBERS).read_bytes())
        if n.pop("sha256", None) != _checksum(n, data):
            raise ValueError("the checksum does not match")
        tensors = {name: each.to(place) for name, each in load(data).items()}
        mean, start, gradient, stiffest = (tensors.pop(name) for name in ("mean", "start", "gradient", "stiffest"))
        mixing, force = tensors.pop("mixing").cpu(), tensors.pop("force").cpu()
        geometry = Geometry(
            metric=restore(n["metric"], mean, tensors),
            mixing=mixing,
            force=force,
            stiffest=stiffest,
            gradient=gradient,
            traffic=Traffic(*n["traffic"]),
            **{name: n[name] for name in _MEASURED},
        )
        return Prepared(geometry, Forecast(**{f.name: n[f.name] for f in fields(Forecast)}), start, n["radius"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{path}: the run's geometry ({_TENSORS}, {_NUMBERS}) is missing or damaged, and it cannot be resumed: "
            f"{error}. Start a new run in another directory"
        ) from error
