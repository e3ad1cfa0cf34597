"""Load settings from their sources, in rising precedence: defaults, preset, file or dict, environment, `--set`."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsample.config.error_messages import Problem, SettingsError
from fedsample.config.experiment import IMPLIED, Experiment
from fedsample.config.fields import OF_THE_MACHINE, PREFIX, fields, nearest, variable
from fedsample.config.presets import PRESETS, preset
from fedsample.config.values import flatten, merge, nest, plain, same
from fedsample.errors import ConfigError

Source = Mapping[str, Any] | str | Path | Experiment | None


def load(
    source: Source = None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Experiment:
    """Load the experiment that a source describes, overridden by the environment and by `overrides`.

    Args:
        source: a dict nested as the TOML is, the path of a TOML file, or None for the defaults. An `Experiment` is
            complete: the environment is ignored, and overrides may even change its preset.
        overrides: "section.key=value", as for --set; the value is a TOML literal or a bare word.
        environment: mapping that holds `FEDSAMPLE_*`; None: `os.environ`; {}: none, as when a run is resumed.

    Raises:
        ConfigError: if a key is unknown, a value is of the wrong type or out of range, or settings contradict one
            another.
    """
    return trace(source, overrides, environment)[0]


def trace(
    source: Source = None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[Experiment, dict[str, str]]:
    """Do as `load`, and tell what set each value that is not the default: {"uplink.k": "FEDSAMPLE_UPLINK__K", ...}."""
    layers = [_from_source(source)]
    if not isinstance(source, Experiment):
        layers += _from_environment(os.environ if environment is None else environment)
    layers += [_from_override(text) for text in overrides]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        values = merge(values, layer)
        origins.update({path: origin for path, _ in flatten(layer)})
    try:
        experiment = Experiment(**values)
    except SettingsError as error:
        raise SettingsError(error.problems, origins) from None
    default = dict(flatten(Experiment().model_dump()))
    row = dict(flatten(preset(experiment.preset).overrides))
    changed = [path for path, value in flatten(experiment.model_dump()) if not same(value, default[path])]
    preset_origin = f"preset {experiment.preset}"
    return experiment, {p: origins.get(p, preset_origin if p in row else "implied by data") for p in changed}


def _from_source(source: Source) -> tuple[str, dict[str, Any]]:
    """Name the origin of the first layer, and read the layer."""
    if source is None:
        return "default", {}
    if isinstance(source, Experiment):
        base = dict(flatten(Experiment(preset=source.preset).model_dump()))
        layer: dict[str, Any] = {"preset": source.preset}
        implied = IMPLIED | {
            f"{link}.compressor"
            for link in ("uplink", "downlink")
            if getattr(source, link).name != base[f"{link}.name"]
        }
        for path, value in flatten(source.model_dump()):
            if not same(value, base[path]) or path in implied:
                layer = merge(layer, nest(path, value))
        return "the experiment", layer
    if isinstance(source, Mapping):
        return "the dict", plain(source)
    if isinstance(source, str | Path):
        return str(source), _from_file(Path(source))
    raise ConfigError(f"got a {type(source).__name__}; expected a dict, the path of a TOML file, or an Experiment")


def _from_file(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except FileNotFoundError:
        advice = "`fedsample config init` writes one"
        if str(path) in PRESETS:
            advice = f'to use the preset of that name: --preset {path}, or {{"preset": "{path}"}} from Python'
        raise ConfigError(f"{path}: there is no such configuration file; {advice}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory; name the TOML file in it, such as {path / 'config.toml'}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    file = values.get("data", {}).get("file") if isinstance(values.get("data"), dict) else None
    if isinstance(file, str) and file and (path.parent / file).exists():
        values["data"]["file"] = str(path.parent / file)
    return values


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Make one layer per `FEDSAMPLE_*` variable."""
    known = {variable(path): path for path in fields()}
    ours = sorted(name for name in environment if name.startswith(PREFIX) and name not in OF_THE_MACHINE)
    unknown = [name for name in ours if name not in known]
    if unknown:
        close = [variable(nearest(name.removeprefix(PREFIX).lower().replace("__", "."))) for name in unknown]
        text = "unknown environment variable; the nearest known one is "
        raise SettingsError([Problem(name, text + near) for name, near in zip(unknown, close, strict=True)])
    return [(name, nest(known[name], _value(environment[name]))) for name in ours]


def _from_override(text: str) -> tuple[str, dict[str, Any]]:
    """Make the layer of one `section.key=value`."""
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"--set {text}: expected section.key=value, such as uplink.k=32 or rounds=2000")
    return f"--set {text}", nest(path.strip(), _value(value.strip()))


def _value(text: str) -> Any:
    """Parse text as a TOML literal if it is one, else return the text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text
