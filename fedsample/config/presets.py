"""Presets: published methods as rows of a table of settings.

A row overrides the defaults of `fedsample.config.Experiment`, and the user's settings override the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedsample.errors import ConfigError


class Preset(NamedTuple):
    """One row of the table.

    Attributes:
        name: what a user writes after `preset =`.
        overrides: the settings that make the method, nested as in TOML.
        reference: publication.
        summary: one-line description.
        guarantee: law of its draws, and order in the step of their bias.
        up: what a client sends per chain and round.
        bits_up: its bits in float32, without padding to bytes, with K, s, p, d as in the settings.
        down: what a client receives per chain and round.
        bits_down: its bits in float32, likewise.
    """

    name: str
    overrides: Mapping[str, Any]
    reference: str
    summary: str
    guarantee: str
    up: str
    bits_up: str
    down: str = "the iterate, d values"
    bits_down: str = "32 d"


DEFAULT = "underdamped-diana"


def _mcmc(uplink: dict[str, Any], sampler: str = "langevin", metric: str = "identity") -> dict[str, Any]:
    """Settings of a method that is defined by its uplink."""
    return {
        "temperature": 1.0,
        "step_size": "auto",
        "sampler": {"name": sampler},
        "metric": {"name": metric},
        "uplink": uplink,
        "downlink": {"name": "dense"},
    }


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
        guarantee="the posterior as the step goes to 0; compression adds a stationary bias of order 2 in the step that "
        "does not depend on how clients differ; lost replies and absent clients allowed",
        up="K values of a gradient difference to the memory",
        bits_up="32 K",
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
        up="K values of a gradient difference between rounds, with probability p the whole gradient",
        bits_up="32 (p d + (1 - p) K)",
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
        up="K values of a gradient difference to the memory",
        bits_up="32 K",
    ),
    Preset(
        name="underdamped-marina",
        overrides=_mcmc({"name": "marina", "compressor": "randblock", "k": 0.05}, "baoab", "hessian"),
        reference="BAOAB: Leimkuhler & Matthews 2013, arXiv 1203.5428; MARINA: Gorbunov et al. 2021, arXiv 2102.07845",
        summary="underdamped Langevin, whitened by the Hessian at the mode, over compressed gradient differences",
        guarantee="the posterior as the step goes to 0; compression adds a stationary bias of order 2 in the step",
        up="K values of a gradient difference between rounds, with probability p the whole gradient",
        bits_up="32 (p d + (1 - p) K)",
    ),
    Preset(
        name="whitened-diana",
        overrides=_mcmc({"name": "diana", "compressor": "randblock", "k": 0.05}, "langevin", "hessian"),
        reference="QLSD with memory, Vono et al. 2022, arXiv 2106.00797, in whitened coordinates",
        summary="Langevin, whitened by the Hessian at the mode, over compressed gradients with memory",
        guarantee="the posterior as the step goes to 0; compression adds a stationary bias of order 2 in the step, "
        "beyond Langevin's own of order 1",
        up="K values of a gradient difference to the memory",
        bits_up="32 K",
    ),
    Preset(
        name="qlsd",
        overrides=_mcmc({"name": "direct", "compressor": "qsgd", "levels": 255}),
        reference="Vono et al. 2022, arXiv 2106.00797",
        summary="Langevin over directly quantised gradients",
        guarantee="the posterior as the step goes to 0; the bias is of order 1 in the step and grows with the clients' "
        "disagreement",
        up="the norm of the gradient and d signed levels",
        bits_up="32 + d (1 + ceil(log2(s + 1)))",
    ),
    Preset(
        name="qlsd-star",
        overrides=_mcmc({"name": "direct", "compressor": "qsgd", "levels": 255, "variance_reduction": "mode"}),
        reference="Vono et al. 2022, arXiv 2106.00797",
        summary="Langevin over quantised differences to the gradients at the mode",
        guarantee="the posterior as the step goes to 0; the bias is of order 1 in the step, whatever the clients' "
        "disagreement",
        up="norm and signed levels of the gradient less the one at the mode",
        bits_up="32 + d (1 + ceil(log2(s + 1)))",
    ),
    Preset(
        name="qlsd-plus-plus",
        overrides={
            **_mcmc({"name": "diana", "compressor": "qsgd", "levels": 255, "variance_reduction": "svrg"}),
            "batch_size": 32,
        },
        reference="Vono et al. 2022, arXiv 2106.00797; SVRG: Johnson & Zhang 2013",
        summary="Langevin over quantised minibatch gradients with SVRG references and memories",
        guarantee="the posterior as the step goes to 0; compression adds a bias of order 2 in the step, minibatches "
        "one of order 1 that shrinks with the distance to the reference",
        up="norm and signed levels of a gradient difference to the memory",
        bits_up="32 + d (1 + ceil(log2(s + 1)))",
        down="the iterate, d values; the reference too for who was away when it moved",
    ),
    Preset(
        name="d-elf",
        overrides=_mcmc({"name": "ef21", "compressor": "topk", "k": 0.05}),
        reference="Karagulyan & Richtarik 2023, arXiv 2303.04622",
        summary="Langevin over error-fed-back gradients (uplink compressed)",
        guarantee="the posterior as the step goes to 0; the bias is of order 1 in the step",
        up="the K largest entries of a gradient difference to the memory, with coordinates; round 1 whole",
        bits_up="32 K + min(K ceil(log2(d)), d)",
    ),
    Preset(
        name="p-elf",
        overrides={
            **_mcmc({"name": "dense", "compressor": "identity"}),
            "downlink": {"name": "ef21-p", "compressor": "topk", "k": 0.05},
        },
        reference="Karagulyan & Richtarik 2023, arXiv 2303.04622",
        summary="Langevin over gradients at error-fed-back iterates (downlink compressed)",
        guarantee="the posterior as the step goes to 0; the bias is of order 1 in the step",
        up="the gradient, d values",
        bits_up="32 d",
        down="the K largest entries of the iterate's difference to what clients see, with coordinates; round 1 whole",
        bits_down="32 K + min(K ceil(log2(d)), d)",
    ),
    Preset(
        name="b-elf",
        overrides={
            **_mcmc({"name": "ef21", "compressor": "topk", "k": 0.05}),
            "downlink": {"name": "ef21-p", "compressor": "topk", "k": 0.05},
        },
        reference="Karagulyan & Richtarik 2023, arXiv 2303.04622",
        summary="Langevin with error feedback both ways (both links compressed)",
        guarantee="the posterior as the step goes to 0; the bias is of order 1 in the step",
        up="the K largest entries of a gradient difference to the memory, with coordinates; round 1 whole",
        bits_up="32 K + min(K ceil(log2(d)), d)",
        down="the K largest entries of the iterate's difference to what clients see, with coordinates; round 1 whole",
        bits_down="32 K + min(K ceil(log2(d)), d)",
    ),
    Preset(
        name="dsgld",
        overrides={
            **_mcmc({"name": "dense", "compressor": "identity"}),
            "batch_size": 32,
            "fleet": {"participation": 1},
        },
        reference="Ahn, Shahbaba & Welling, ICML 2014",
        summary="Langevin over the minibatch gradient of one client per round, scaled up",
        guarantee="the posterior as the step goes to 0; the bias is of order 1 in the step and grows with the clients' "
        "disagreement",
        up="the minibatch gradient of one client, d values",
        bits_up="32 d",
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
        up="the gradient, d values",
        bits_up="32 d",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset(name: str) -> Preset:
    """Return the row of this name.

    Raises:
        ConfigError: if there is none; names the nearest and all known ones.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name.lower().replace("_", "-"), PRESETS, n=1, cutoff=0.5)
        nearest = f'the nearest is "{close[0]}"; ' if close else ""
        raise ConfigError(f'preset: got "{name}"; {nearest}there are {", ".join(PRESETS)}')
    return PRESETS[name]


def table() -> list[dict[str, str]]:
    """Return the rows as text, for `fedsample list presets`."""
    return [
        {
            "name": row.name,
            "summary": row.summary,
            "guarantee": row.guarantee,
            "uplink": row.up,
            "downlink": row.down,
            "bits per chain and round": f"{row.bits_up} up, {row.bits_down} down",
            "reference": row.reference,
        }
        for row in _ROWS
    ]
