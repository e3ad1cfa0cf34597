"""Load an experiment from a Flower run's configuration or a run directory's config.toml."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsample.config import Experiment, Source, dump_toml, load
from fedsample.errors import ConfigError, RunDirectoryError

if TYPE_CHECKING:
    pass


def of_run_config(run_config: Mapping[str, bool | float | int | str]) -> Experiment:
    """Load the experiment of a Flower run, the same on server and clients; environment variables are ignored.

    Args:
        run_config: from `[tool.flwr.app.config]` and `flwr run --run-config`. `config-file` names a TOML file, or
            `config` is its text; every other key is a setting, such as `uplink.k`, and overrides the file. Keys that
            begin with `app.` belong to the app.

    Raises:
        ConfigError: if both `config-file` and `config` are given, or the configuration is invalid.
    """
    import tomli_w

    settings = {name: value for name, value in run_config.items() if not name.startswith("app.")}
    file, text = settings.pop("config-file", ""), settings.pop("config", "")
    if file and text:
        raise ConfigError("the run configuration has both config-file and config: give the path or the text, not both")
    try:
        source: Source = Path(str(file)) if file else tomllib.loads(str(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the run configuration's key config is not TOML: {error}") from error
    literals = {name: tomli_w.dumps({"v": value}).removeprefix("v = ").strip() for name, value in settings.items()}
    return load(source, [f"{name}={literal}" for name, literal in literals.items()], {})


def digest(experiment: Experiment) -> str:
    """Hash of the settings that a checkpoint depends on: all but `rounds` and the section `monitor`."""
    values = tomllib.loads(dump_toml(experiment))
    for free in ("rounds", "monitor"):
        values.pop(free, None)
    return hashlib.sha256(repr(sorted(_leaves(values))).encode()).hexdigest()[:32]


def _leaves(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    result = []
    for name, value in values.items():
        result += _leaves(value, f"{path}{name}.") if isinstance(value, Mapping) else [(f"{path}{name}", repr(value))]
    return result


def reread(text: str) -> Experiment:
    """Load the experiment from the text of a run directory's config.toml; environment variables are ignored.

    Raises:
        RunDirectoryError: if the text is not a valid configuration.
    """
    try:
        return Experiment(**tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise RunDirectoryError(
            f"config.toml of the run cannot be used: {error}; restore it, or start a new run in another directory"
        ) from error
