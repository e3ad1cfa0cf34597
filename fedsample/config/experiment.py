"""An experiment: complete settings without contradictions.

Whether a combination of settings samples the right law is checked in `estimators.soundness`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from fedsample.config.error_messages import Problem, SettingsError, problems_of
from fedsample.config.presets import DEFAULT, preset
from fedsample.config.sections import Settings
from fedsample.config.values import flatten, merge, plain

_LARGEST = 2**63 - 1  # largest integer that a tensor holds
_SCALES = (1e-18, 1e18)  # standard deviations whose precision a float32 holds
# Settings that others imply if they are not given; a complete experiment gives them, even at their defaults.
IMPLIED = {"data.name", "data.partition", "model.name", "model.prior_scale"}


class Experiment(Settings):
    """One complete experiment; the preset fills in what is not given.

    Args:
        **values: the settings, nested as the TOML is.

    Raises:
        ConfigError: lists all invalid settings.
    """

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(problems_of(error)) from None

    @property
    def draws(self) -> int:
        """Number of draws kept per chain: one every `thin` rounds after the warm-up."""
        return (self.rounds - self.warmup) // self.thin

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Override the preset's row by the given settings, and add what they imply."""
        given = plain(values)
        name = given.get("preset", DEFAULT)
        uplink = given.get("uplink")
        if isinstance(uplink, Mapping) and uplink.get("name") == "dense":  # the preset's compressor does not fit it
            given["uplink"] = {"compressor": "identity", **uplink}
        downlink = given.get("downlink")
        if isinstance(downlink, Mapping) and downlink.get("name") == "dense":
            given["downlink"] = {"compressor": "identity", **downlink}
        return _imply(merge(preset(name).overrides, given) if isinstance(name, str) else given)

    @model_validator(mode="after")
    def _agree(self) -> Experiment:
        """Refuse settings that contradict one another."""
        problems = list(_contradictions(self))
        if problems:
            raise SettingsError(problems)
        return self


def _imply(values: dict[str, Any]) -> dict[str, Any]:
    """Add settings that the kind of data implies and the user left out; make the data's path absolute."""
    data = values.get("data")
    if not isinstance(data, Mapping):
        return values
    data = dict(data)
    kind = data.get("kind", "builtin")
    if kind != "builtin":
        data.setdefault("name", None)
    if data.get("client_column"):
        data.setdefault("partition", "natural")
    if data.get("file") and isinstance(data["file"], str):
        data["file"] = os.path.abspath(os.path.expanduser(data["file"]))
    values = {**values, "data": data}
    model = values.get("model", {})
    if kind == "quadratic" and isinstance(model, Mapping) and model.get("name", "quadratic") == "quadratic":
        values["model"] = {"name": "quadratic", "prior_scale": None, **model}
    return values


def _out_of_range(e: Experiment) -> Iterator[Problem]:
    """Yield numbers that are too large or too small to compute with."""
    model = e.model
    for path, value in flatten(e.model_dump()):
        if isinstance(value, int) and value > _LARGEST:
            yield Problem(path, f"got {value}; expected at most {_LARGEST}")
    for path, scale in (("model.prior_scale", model.prior_scale), ("model.noise_scale", model.noise_scale)):
        if scale is not None and not _SCALES[0] <= scale <= _SCALES[1]:
            yield Problem(
                path,
                f"got {scale}; expected from {_SCALES[0]} to {_SCALES[1]}, because its square is divided by"
                + ('; "flat" is a prior that says nothing' if path == "model.prior_scale" and scale > 1 else ""),
            )


def _contradictions(e: Experiment) -> Iterator[Problem]:
    """Yield contradictions between settings."""
    data, model, fleet = e.data, e.model, e.fleet
    yield from _out_of_range(e)
    if e.warmup >= e.rounds:
        yield Problem(
            "warmup", f"{e.warmup} rounds of warm-up leave none of {e.rounds}; lower it, to {e.rounds // 5} say"
        )
    elif e.draws < 1:
        yield Problem("thin", f"no draw in {e.rounds - e.warmup} rounds with one every {e.thin}; lower thin")
    if data.kind == "builtin":
        if data.name is None:
            yield Problem("data.name", "missing; name one of `fedsample list datasets`, or set data.kind")
        if data.file is not None:
            kind = {".npz": "npz", ".parquet": "parquet"}.get(Path(data.file).suffix, "csv")
            yield Problem("data.file", f'built-in data reads no file; set data.kind = "{kind}", or drop data.file')
    elif data.file is None and fleet.name != "grpc":
        yield Problem("data.file", f'missing; data.kind = "{data.kind}" needs the path of its file')
    if data.kind in ("csv", "parquet"):
        if data.target is None and fleet.name != "grpc":
            yield Problem("data.target", f'missing; data.kind = "{data.kind}" needs the name of the label column')
        if (data.client_column is not None) != (data.partition == "natural"):
            yield Problem("data.client_column", 'goes with data.partition = "natural": give both or none')
    else:
        for key in ("target", "client_column"):
            if getattr(data, key) is not None:
                yield Problem(f"data.{key}", f'only csv and parquet have it; drop it for data.kind = "{data.kind}"')
    if data.features is not None and data.kind in ("npz", "quadratic"):
        yield Problem("data.features", f'its columns have no names; drop it for data.kind = "{data.kind}"')
    if data.labels is not None and data.kind == "quadratic":
        yield Problem("data.labels", 'there is nothing to predict; drop it for data.kind = "quadratic"')
    if (data.kind == "quadratic") != (model.name == "quadratic"):
        advice = "drop model.name" if data.kind == "quadratic" else 'it needs data.kind = "quadratic"'
        yield Problem("model.name", f'got "{model.name}" with data.kind = "{data.kind}"; {advice}')
    waits_for_all = fleet.quorum == 1.0 and isinstance(fleet.quorum, float)
    if fleet.deadline is not None and waits_for_all:
        yield Problem("fleet.deadline", "needs a fleet.quorum below all devices, such as 0.8, that is enough after it")
    if fleet.name != "grpc" and not waits_for_all:
        yield Problem("fleet.quorum", f'simulated devices are never slow; drop it for fleet "{fleet.name}"')
    if isinstance(fleet.quorum, int) and fleet.quorum > data.clients:
        yield Problem("fleet.quorum", f"got {fleet.quorum} of {data.clients} clients; ask for fewer")
    if e.start.at == "prior" and model.prior_scale is None:
        yield Problem("start.at", 'a flat prior cannot be drawn from; set model.prior_scale, or start at "mode"')
    if e.uplink.p is not None and e.uplink.name != "marina":
        yield Problem("uplink.p", f'only marina has full rounds; set uplink.p = "auto" for uplink "{e.uplink.name}"')
    reduction = e.uplink.variance_reduction
    if reduction != "none" and e.batch_size is None and e.uplink.name != "direct":
        yield Problem(
            "uplink.variance_reduction",
            f'"{reduction}" reduces the variance of minibatches, and there are none; set batch_size, or drop it',
        )
    dealt = data.kind in ("builtin", "csv", "parquet") and data.partition != "natural"
    if dealt and isinstance(fleet.participation, int) and fleet.participation > data.clients:
        yield Problem("fleet.participation", f"got {fleet.participation} of {data.clients} clients; ask for fewer")
