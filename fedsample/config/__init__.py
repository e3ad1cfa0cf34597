"""Configuration: an experiment is one validated object, read from and written as TOML.

Precedence: defaults < preset < file or dict < `FEDSAMPLE_*` environment < `--set section.key=value`.
"""

from fedsample.config.error_messages import SettingsError
from fedsample.config.experiment import Experiment
from fedsample.config.fields import PREFIX, nearest, variable
from fedsample.config.rendering import Key, dump_toml, keys, template
from fedsample.config.sections import (
    DataConfig,
    DownlinkConfig,
    FleetConfig,
    MetricConfig,
    ModelConfig,
    MonitorConfig,
    SamplerConfig,
    ScheduleConfig,
    Section,
    StartConfig,
    UplinkConfig,
)
from fedsample.config.sources import Source, load, trace

__all__ = [
    "PREFIX",
    "DataConfig",
    "DownlinkConfig",
    "Experiment",
    "FleetConfig",
    "Key",
    "MetricConfig",
    "ModelConfig",
    "MonitorConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "Section",
    "SettingsError",
    "Source",
    "StartConfig",
    "UplinkConfig",
    "dump_toml",
    "keys",
    "load",
    "nearest",
    "template",
    "trace",
    "variable",
]
