"""Presets: a published name is a row of this table, not a class.

A row overrides the defaults of `fedsample.config.Experiment` and is itself overridden by whatever the user sets.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedsample.errors import ConfigError


class Preset(NamedTuple):
    """One row.

    Attributes:
        name: what a user writes after `preset =`.
        overrides: the settings that make the method, nested as in TOML.
        reference: who published it.
        summary: what it is, in one line.
        guarantee: what its draws follow.
    """

    name: str
    overrides: Mapping[str, Any]
    reference: str
    summary: str
    guarantee: str


DEFAULT = "underdamped-diana"

_ROWS = (
    Preset(
        name="underdamped-diana",
        overrides={
            "temperature": 1.0,
            "step_size": "auto",
            "sampler": {"name": "baoab", "friction": 1.0},
            "metric": {"name": "hessian"},
            "uplink": {"name": "diana", "compressor": "randblock", "k": 0.05},
            "downlink": {"name": "dense"},
        },
        reference="BAOAB: Leimkuhler & Matthews 2013, arXiv 1203.5428; DIANA: Mishchenko et al. 2019, arXiv 1901.09269",
        summary="underdamped Langevin, whitened by the Hessian at the mode, over compressed gradients with memory",
        guarantee="the posterior as the step goes to 0; the error of compression vanishes with the step and does not "
        "depend on how clients differ; lost replies and absent clients allowed",
    ),
    Preset(
        name="langevin-marina",
        overrides={
            "temperature": 1.0,
            "step_size": "auto",
            "sampler": {"name": "langevin"},
            "metric": {"name": "identity"},
            "uplink": {"name": "marina", "compressor": "randk", "k": 0.05},
            "downlink": {"name": "dense"},
        },
        reference="Sun, Salim & Richtarik 2022, arXiv 2206.00920",
        summary="Langevin over compressed gradient differences, with a full round now and then",
        guarantee="the posterior as the step goes to 0; compression adds a stationary bias of order 2 in the step, "
        "beyond Langevin's own of order 1",
    ),
    Preset(
        name="langevin-diana",
        overrides={
            "temperature": 1.0,
            "step_size": "auto",
            "sampler": {"name": "langevin"},
            "metric": {"name": "identity"},
            "uplink": {"name": "diana", "compressor": "randk", "k": 0.05},
            "downlink": {"name": "dense"},
        },
        reference="Vono et al. 2022, arXiv 2106.00797 (QLSD, with memory); Mishchenko et al. 2019, arXiv 1901.09269",
        summary="Langevin over compressed gradients with memory",
        guarantee="the posterior as the step goes to 0; compression adds a stationary bias of order 2 in the step, "
        "beyond Langevin's own of order 1; lost replies and absent clients allowed",
    ),
    Preset(
        name="federated-gd",
        overrides={
            "rounds": 500,
            "warmup": 0,
            "thin": 1,
            "chains": 1,
            "temperature": 0.0,
            "step_size": "auto",
            "sampler": {"name": "langevin"},
            "metric": {"name": "identity"},
            "uplink": {"name": "dense", "compressor": "identity"},
            "downlink": {"name": "dense"},
            "start": {"at": "zeros"},
        },
        reference="textbook gradient descent on the sum of the clients' gradients",
        summary="gradient descent: Langevin at temperature 0, every gradient sent in full",
        guarantee="the mode of the posterior, and no posterior: nothing is drawn at temperature 0",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset(name: str) -> Preset:
    """The row of that name.

    Raises:
        ConfigError: there is none; names the nearest and all that there are.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ConfigError(f'preset: got "{name}"; the nearest is "{nearest}"; there are {", ".join(PRESETS)}')
    return PRESETS[name]


def table() -> list[dict[str, str]]:
    """The rows as text, for `fedsample list presets`."""
    return [
        {"name": row.name, "summary": row.summary, "guarantee": row.guarantee, "reference": row.reference}
        for row in _ROWS
    ]
