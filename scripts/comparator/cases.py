"""What is run: every preset by every engine, and once each of everything else that must stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS, HALF = 20, 10
PRESETS = (
    "underdamped-diana", "langevin-marina", "langevin-diana", "underdamped-marina", "whitened-diana", "qlsd", "qlsd-star",
    "qlsd-plus-plus", "d-elf", "p-elf", "b-elf", "dsgld", "federated-gd",
)  # fmt: skip
ENGINES = ("by-client", "batched", "compiled")
DTYPES = ("float32", "float64")

Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One experiment, run by both checkouts.

    Attributes:
        name: of its run directory.
        group: its row of the final table.
        config: what `fedsample.run` gets.
        quick: whether `--quick` runs it.
        then: what follows: "" nothing; "resume": it stops at half of its rounds and is taken up again, by the new
            checkout too where the old one stopped; "replay": its participation is replayed.
        flower: whether its messages are Flower's, which are written down.
    """

    name: str
    group: str
    config: Config = field(repr=False)
    quick: bool = False
    then: str = ""
    flower: bool = False


def make_data(folder: Path) -> dict[str, Path]:
    """Small federations: `logistic`, `classes`, `linear`, `images` and `quadratic`, with unevenly many rows."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(20)
    x = draw.normal(size=(280, 30))
    client = np.sort(draw.integers(0, 6, 240)) // 2
    logits = x @ draw.normal(size=(30, 4)) / 3
    labels = {
        "logistic": (logits[:, 0] + draw.logistic(size=280) > 0).astype(np.int64),
        "classes": np.argmax(logits + draw.gumbel(size=(280, 4)), axis=1),
        "linear": logits[:, 0] + draw.normal(size=280),
    }
    files = {name: folder / f"{name}.npz" for name in (*labels, "images", "quadratic", "large")}
    for name, y in labels.items():
        np.savez(files[name], X=x[:240], y=y[:240], client=client, X_test=x[240:], y_test=y[240:])
    pictures = draw.normal(size=(30, 3, 32, 32)).astype(np.float32)
    np.savez(files["images"], X=pictures, y=np.arange(30) % 10, client=np.arange(30) % 2)
    np.savez(files["quadratic"], lam=draw.uniform(0.5, 2, (4, 12)), a=draw.normal(size=(4, 12)))
    wide = draw.normal(size=(40_000, 60))  # entries enough for threads of the compiled engine
    hit = (wide[:, 0] + draw.logistic(size=40_000) > 0).astype(np.int64)
    np.savez(files["large"], X=wide, y=hit, client=np.arange(40_000) % 2)
    return files


def cases(data: Mapping[str, Path]) -> Iterator[Case]:
    """All of them, the quick ones among them."""
    yield from _presets(data)


def _presets(data: Mapping[str, Path]) -> Iterator[Case]:
    for number, preset in enumerate(PRESETS):
        for threads in (1, 2):
            for place, (engine, dtype) in enumerate((engine, dtype) for engine in ENGINES for dtype in DTYPES):
                name = f"{preset}/{engine}/{dtype}/{threads}"
                threaded = f"presets, {threads} thread{'s' * (threads > 1)}"
                fleet = {"engine": engine, "threads": threads}
                config = on(data, "logistic", preset=preset, dtype=dtype, fleet=fleet)
                yield Case(name, threaded, config, quick=threads == 1 and place == number % 6)


def on(data: Mapping[str, Path], kind: str, **more: Any) -> Config:
    """A configuration on one of the federations of `make_data`, with sections of `more` laid over it."""
    models = {"classes": "softmax", "images": "lenet5", "large": "logistic"}
    base: Config = {
        "rounds": ROUNDS,
        "warmup": 0,
        "thin": 1,
        "chains": 2,
        "data": {"kind": "quadratic" if kind == "quadratic" else "npz", "file": str(data[kind])},
        "monitor": {"every": 5, "tensorboard": False, "checkpoint_seconds": 0},
        "fleet": {"threads": 1},
    }
    if kind != "quadratic":
        base["model"] = {"name": models.get(kind, kind)}
    return laid_over(base, more)


def laid_over(base: Mapping[str, Any], more: Mapping[str, Any]) -> Config:
    """A configuration with the values of another, section by section."""
    result = copy.deepcopy(dict(base))
    for name, value in more.items():
        old = result.get(name)
        result[name] = laid_over(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return result
