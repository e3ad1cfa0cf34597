"""What is run: every preset by every engine, and once each of everything else that must stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet

ROUNDS, HALF = 20, 10
PRESETS = (
    "underdamped-diana", "langevin-marina", "langevin-diana", "underdamped-marina", "whitened-diana", "qlsd",
    "qlsd-star", "qlsd-plus-plus", "d-elf", "p-elf", "b-elf", "dsgld", "federated-gd",
)  # fmt: skip
ENGINES = ("by-client", "batched", "compiled")
DTYPES = ("float32", "float64")
COMPRESSORS = (
    "identity", "randk", "randblock", "topk", "qsgd", "natural", "sign", "permk", "lowrank", "bf16", "randk+natural",
    "topk+qsgd", "scaled-randk", "scaled-qsgd",
)  # fmt: skip
_QUICK_LINKS = {("ef21", "lowrank"), ("diana", "permk"), ("direct", "natural"), ("marina", "qsgd"), ("ef21", "sign")}

Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One experiment, run by both checkouts.

    Attributes:
        name: of its run directory.
        group: its row of the final table.
        config: what `fedsample.run` gets.
        quick: whether `--quick` runs it.
        then: what follows: "" nothing; "resumed": it stops at half of its rounds and is taken up again, by the new
            checkout too where the old one stopped; "replayed": its participation is replayed.
        flower: whether its messages are Flower's, which are written down.
    """

    name: str
    group: str
    config: Config = field(repr=False)
    quick: bool = False
    then: str = ""
    flower: bool = False


def make_data(folder: Path) -> dict[str, Path]:
    """Small federations, most with unevenly many rows: arrays, a quadratic, and a table with text in it."""
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
    pictures = draw.normal(size=(6, 1, 28, 28)).astype(np.float32)
    np.savez(files["images"], X=pictures, y=np.arange(6) % 3, client=np.arange(6) % 2)
    np.savez(files["quadratic"], lam=draw.uniform(0.5, 2, (4, 12)), a=draw.normal(size=(4, 12)))
    wide = draw.normal(size=(40_000, 60))  # entries enough for threads of the compiled engine
    hit = (wide[:, 0] + draw.logistic(size=40_000) > 0).astype(np.int64)
    np.savez(files["large"], X=wide, y=hit, client=np.arange(40_000) % 2)
    _write_tables(folder, files, draw)
    return files


def _write_tables(folder: Path, files: dict[str, Path], draw: np.random.Generator) -> None:
    """The same rows as CSV and as Parquet: numbers, text, a label in words and the client."""
    columns = {
        "height": draw.normal(size=120).round(6).tolist(),
        "colour": draw.choice(["red", "green", "blue"], 120).tolist(),
        "weight": draw.exponential(size=120).round(6).tolist(),
        "place": draw.choice(["north", "south", "west"], 120).tolist(),
        "label": draw.choice(["no", "yes", "perhaps"], 120).tolist(),
    }
    table = pyarrow.table(columns)
    files["csv"], files["parquet"] = folder / "table.csv", folder / "table.parquet"
    pyarrow.csv.write_csv(table, files["csv"])
    pyarrow.parquet.write_table(table, files["parquet"])


def cases(data: Mapping[str, Path]) -> Iterator[Case]:
    """All of them, the quick ones among them."""
    yield from _presets(data)
    yield from _once(data)
    yield from _links(data)
    yield from _targets(data)


def _presets(data: Mapping[str, Path]) -> Iterator[Case]:
    """Every preset by every engine, with each number of threads and each precision; and resumed half-way."""
    for number, preset in enumerate(PRESETS):
        for threads in (1, 2):
            for place, (engine, dtype) in enumerate((engine, dtype) for engine in ENGINES for dtype in DTYPES):
                name = f"{preset}/{engine}/{dtype}/{threads}"
                group = f"presets, {threads} thread{'s' * (threads > 1)}"
                fleet = {"engine": engine, "threads": threads}
                step = "auto" if dtype == "float32" else 0.01  # choosing a step takes half of the time
                config = on(data, "logistic", preset=preset, dtype=dtype, fleet=fleet, step_size=step)
                yield Case(name, group, config, quick=threads == 1 and place % 3 == number % 3)  # one of each precision
        config = on(data, "logistic", preset=preset, step_size=0.01)
        yield Case(f"resume/{preset}", "resumed at round 10", config, quick=number in (0, 1, 7, 10), then="resumed")


def _once(data: Mapping[str, Path]) -> Iterator[Case]:
    """Once each of what a chain can meet, and of what can be asked of it."""
    lossy = {"participation": 0.6, "loss": 0.15, "dropout": 0.1, "dropout_rounds": 3.0}
    absent: dict[str, Config] = {"share": {"participation": 0.5}, "cohort": {"participation": 2}, "lossy": lossy}
    for preset in ("underdamped-diana", "langevin-marina", "qlsd-plus-plus", "b-elf"):
        for name, fleet in absent.items():
            config = on(data, "classes", preset=preset, step_size=0.01, fleet=fleet)
            yield Case(
                f"drop-outs/{name}/{preset}", "drop-outs", config, quick=(name, preset) == ("lossy", "langevin-marina")
            )
    for preset in ("underdamped-diana", "langevin-marina", "dsgld"):
        config = on(data, "logistic", preset=preset, step_size=0.01, fleet={"engine": "by-client", **lossy})
        yield Case(f"replay/{preset}", "replayed", config, quick=preset == "underdamped-diana", then="replayed")
    for engine in ("by-client", "batched"):
        for kind, preset in (("classes", "langevin-diana"), ("linear", "underdamped-marina"), ("classes", "d-elf")):
            config = on(data, kind, preset=preset, step_size=0.01, batch_size=8, fleet={"engine": engine})
            quick = (engine, kind) == ("batched", "linear")
            yield Case(f"minibatches/{engine}/{preset}", "minibatches", config, quick=quick)
    for preset in PRESETS:
        config = on(data, "classes", preset=preset, step_size=0.01, fleet={"engine": "stacked"})
        yield Case(f"stacked/{preset}", "stacked", config)
    config = on(data, "classes", fleet={"name": "flower", "threads": 1}, chains=8, step_size=0.01)
    yield Case("flower/simulation", "Flower's simulation", config, flower=True)
    settings: dict[str, Config] = {
        "polynomial": {"step_size": {"schedule": "polynomial", "initial": 0.01, "power": 0.5, "offset": 10}},
        "cyclical": {"step_size": {"schedule": "cyclical", "initial": "auto", "period": 7}},
        "zeros": {"start": {"at": "zeros"}},
        "prior": {"start": {"at": "prior"}, "temperature": 0.5},
        "thinned": {"warmup": 5, "thin": 3, "chains": 5, "seed": 12345},
        "friction": {"sampler": {"friction": 3.5}},
        "tensorboard": {"monitor": {"tensorboard": True, "every": 2}},
        "tolerance": {"bias_tolerance": 0.02},
        "engine-auto": {"fleet": {"engine": "auto"}},
        "cuda-graph": {"fleet": {"engine": "cuda-graph"}},
    }
    for name, more in settings.items():
        yield Case(f"setting/{name}", "settings", on(data, "logistic", **more), quick=name == "cyclical")
    refused: dict[str, Config] = {
        "unknown-key": {"chain": 3},
        "bad-value": {"temperature": -1},
        "unsound": {"uplink": {"name": "direct", "compressor": "topk"}},
        "cohort-too-large": {"fleet": {"participation": 9}},
        "no-file": {"data": {"file": "nowhere.npz"}},
        "unstable": {"step_size": 1e30},
    }
    for name, more in refused.items():
        yield Case(f"refused/{name}", "refusals", on(data, "classes", **more), quick=True)


def _links(data: Mapping[str, Path]) -> Iterator[Case]:
    """Every metric; every estimator with every compressor, sound or not; every downlink."""
    for kind in ("classes", "linear", "mlp"):
        for metric in ("kronecker", "diagonal") if kind == "mlp" else ("hessian", "kronecker", "diagonal", "identity"):
            step = "auto" if kind == "linear" or metric == "kronecker" else 0.01
            config = on(data, kind, metric={"name": metric}, step_size=step)
            yield Case(f"metric/{metric}/{kind}", "metrics", config, quick=kind == "classes" and metric == "kronecker")
    for uplink in ("dense", "direct", "marina", "diana", "ef21"):
        for compressor in COMPRESSORS:
            more = {"name": uplink, "compressor": compressor, "k": 3, "levels": 7}
            config = on(data, "classes", preset="langevin-diana", step_size=0.01, uplink=more)
            yield Case(f"uplink/{uplink}/{compressor}", "uplinks", config, quick=(uplink, compressor) in _QUICK_LINKS)
    for name in ("mode", "svrg"):
        more = {"name": "diana", "variance_reduction": name, "refresh": 6}
        config = on(data, "classes", preset="langevin-diana", step_size=0.01, batch_size=8, uplink=more)
        yield Case(f"uplink/variance-reduction/{name}", "uplinks", config)
    for name in ("dense", "ef21-p"):
        for compressor in COMPRESSORS:
            more = {"name": name, "compressor": compressor, "k": 3, "levels": 7}
            config = on(data, "classes", preset="langevin-diana", step_size=0.01, downlink=more)
            yield Case(f"downlink/{name}/{compressor}", "downlinks", config, quick=compressor == "scaled-randk")


def _targets(data: Mapping[str, Path]) -> Iterator[Case]:
    """Every model, every built-in data set, and every way to share out rows and to hold them out."""
    cheap = {"preset": "langevin-diana", "step_size": 1e-4}
    for kind in ("quadratic", "linear", "mlp"):
        config = on(data, kind, preset="langevin-diana", step_size=0.01 if kind == "mlp" else "auto")
        yield Case(f"model/{kind}", "targets", config, quick=kind == "mlp")
    yield Case("model/lenet5", "targets", on(data, "images", **cheap, rounds=3, chains=1, start={"at": "prior"}))
    builtin = {
        "digits": "softmax",
        "breast_cancer": "logistic",
        "wine": "softmax",
        "iris": "softmax",
        "diabetes": "linear",
    }
    for name, model in builtin.items():
        yield Case(f"data/{name}", "targets", _builtin(name, model))
    for partition in ("iid", "shards"):
        config = _builtin("wine", "softmax", data={"partition": partition, "holdout": "keyed"}, **cheap)
        yield Case(f"data/{partition}", "targets", config)
    for engine, threads in (("compiled", 1), ("compiled", 2), ("batched", 1), ("batched", 2)):
        config = on(
            data, "large", preset="langevin-diana", step_size=1e-6, fleet={"engine": engine, "threads": threads}
        )
        yield Case(f"large/{engine}/{threads}", "targets", laid_over(config, {"start": {"at": "zeros"}}))
    for kind in ("csv", "parquet"):
        more = {"kind": kind, "file": str(data[kind]), "target": "label", "client_column": "place"}
        yield Case(
            f"data/{kind}", "targets", laid_over(on(data, "classes", **cheap), {"data": more}), quick=kind == "csv"
        )


def _builtin(name: str, model: str, **more: Any) -> Config:
    base: Config = {
        "rounds": ROUNDS, "warmup": 0, "thin": 1, "chains": 2, "data": {"name": name, "clients": 4},
        "model": {"name": model}, "monitor": {"every": 5, "tensorboard": False}, "fleet": {"threads": 1},
    }  # fmt: skip
    return laid_over(base, more)


def on(data: Mapping[str, Path], kind: str, /, **more: Any) -> Config:
    """A configuration on one of the federations of `make_data`, with sections of `more` laid over it."""
    models = {"classes": "softmax", "images": "lenet5", "large": "logistic"}
    file = data["classes" if kind == "mlp" else kind]
    base: Config = {
        "rounds": ROUNDS,
        "warmup": 0,
        "thin": 1,
        "chains": 2,
        "data": {"kind": "quadratic" if kind == "quadratic" else "npz", "file": str(file)},
        "monitor": {"every": 5, "tensorboard": False, "checkpoint_seconds": 1e6},  # else a clock asks Flower's clients
        "fleet": {"threads": 1},
    }
    if kind != "quadratic":
        base["model"] = {"name": models.get(kind, kind), "hidden": [5]}
    return laid_over(base, more)


def laid_over(base: Mapping[str, Any], more: Mapping[str, Any]) -> Config:
    """A configuration with the values of another, section by section."""
    result = copy.deepcopy(dict(base))
    for name, value in more.items():
        old = result.get(name)
        result[name] = laid_over(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return result
