"""One experiment is one validated object: TOML in, TOML out.

Precedence: defaults < preset < file or dict < `FEDSAMPLE_*` environment < `--set section.key=value`. The classes hold
every setting, with its range and its meaning; error messages, `config init` and `config show --help` are made from
them, so that a setting is described once. What a combination of settings samples is judged elsewhere.
"""

from __future__ import annotations

import difflib
import os
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedsample.errors import ConfigError
from fedsample.presets import DEFAULT, PRESETS, preset

PREFIX = "FEDSAMPLE_"


class Word:
    """The text that stands for None where TOML, which has no null, must say it.

    Args:
        text: what to write; empty: None is written by leaving the key out.
    """

    def __init__(self, text: str) -> None:
        """Remember the word."""
        self.text = text

    def __call__(self, value: Any) -> Any:
        """None for the word, anything else as it came."""
        return None if value == self.text and isinstance(value, str) else value


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Risk = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str | None, BeforeValidator(Word(""))]


def setting(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field with its default, its meaning and its bounds."""
    return Field(default, description=meaning, **bounds)


class Section(BaseModel):
    """A table of settings: immutable, no unknown key, no silent conversion (true is no number, "5" is no 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """What the clients hold."""

    name: Text = setting("digits", "built-in data set, see `fedsample list datasets`; a label for a file")
    kind: Literal["builtin", "npz", "csv", "parquet", "quadratic"] = setting(
        "builtin", "where rows come from; quadratic: a file with lam (n,) or (n, d) and a (n, d)"
    )
    file: Text = setting(None, "path of the data; a relative one is looked for beside the TOML file first")
    clients: Count = setting(10, "how many clients share the rows")
    partition: Literal["dirichlet", "iid", "shards", "natural"] = setting(
        "dirichlet", "how clients get their rows; natural: as client_column, or the data set itself, says"
    )
    alpha: Positive = setting(0.3, "concentration of the Dirichlet partition; smaller is more uneven")
    target: Text = setting(None, "column that holds the label (csv, parquet)")
    client_column: Text = setting(None, "column that names the client (csv, parquet); implies natural")
    test_fraction: Annotated[Risk | None, BeforeValidator(Word("auto"))] = setting(
        None, "share of rows held out; auto: the fixed rule of a built-in set, 0 for npz, else 0.2"
    )
    holdout: Literal["pooled", "keyed"] = setting(
        "pooled", "how they are drawn: from all rows, or from each client's own by its key, as devices with files do"
    )
    standardize: Annotated[bool | None, BeforeValidator(Word("auto"))] = setting(
        None, "scale columns to mean 0, variance 1; auto: as a built-in set documents, not for npz, else yes"
    )
    features: Annotated[list[str] | None, BeforeValidator(Word("auto"))] = setting(
        None, "names of the columns in the order to use; auto: as the file, or the first client, has them"
    )
    labels: Annotated[list[int | str] | None, BeforeValidator(Word("auto"))] = setting(
        None, "all labels that may occur, in any order; auto: those that do"
    )


class ModelConfig(Section):
    """The likelihood and the prior."""

    name: Literal["softmax", "logistic", "linear", "mlp", "lenet5", "resnet20", "quadratic"] = setting(
        "softmax", "model of a row, see `fedsample list models`; data of kind quadratic have their own"
    )
    prior_scale: Annotated[Positive | None, BeforeValidator(Word("flat"))] = setting(
        1.0, "standard deviation of the normal prior on every parameter"
    )
    noise_scale: Positive = setting(1.0, "standard deviation of a Gaussian likelihood")
    hidden: list[Count] = setting([32], "widths of the hidden layers of the mlp")
    intercept: bool = setting(True, "whether linear, logistic and softmax models have an intercept")


class ScheduleConfig(Section):
    """A step that changes from round to round."""

    schedule: Literal["constant", "polynomial", "cyclical"] = setting("polynomial", "how the step changes")
    initial: Positive | Literal["auto"] = setting("auto", "the step of round 1; auto: from the curvature")
    power: Positive = setting(0.55, "polynomial: h (1 + (round - 1) / offset)^-power")
    offset: Positive = setting(1000.0, "polynomial: rounds in which the step falls by 2^-power")
    period: Count = setting(1000, "cyclical: rounds of a cosine cycle")


class SamplerConfig(Section):
    """What the server does with a gradient estimate."""

    name: Literal["baoab", "langevin"] = setting("baoab", "transition kernel, see `fedsample list samplers`")
    friction: Positive = setting(1.0, "friction of baoab, per unit of time in whitened coordinates")


class MetricConfig(Section):
    """The linear map that whitens the target before sampling."""

    name: Literal["hessian", "kronecker", "diagonal", "identity"] = setting(
        "hessian", "curvature at the mode; hessian for up to 5,000 parameters"
    )


class UplinkConfig(Section):
    """How the sum of gradients reaches the server."""

    name: Literal["dense", "direct", "marina", "diana", "ef21"] = setting(
        "diana", "gradient estimator, see `fedsample list estimators`"
    )
    compressor: str = setting(
        "randblock", "what shrinks a packet, see `fedsample list compressors`; randk+natural composes two"
    )
    k: Count | Share = setting(0.05, "coordinates sent: 32 is 32 of them, 0.05 is 5 %, 1 is one, 1.0 is all")
    p: Annotated[Share | None, BeforeValidator(Word("auto"))] = setting(
        None, "probability of a full round (marina); auto: compressed over full bits, the fraction k for randk"
    )
    levels: Count = setting(127, "levels of qsgd")
    rank: Count = setting(1, "rank of lowrank")
    variance_reduction: Literal["none", "mode", "svrg"] = setting(
        "none", "what a client subtracts: nothing, its gradient at the mode, or at a reference that moves (minibatches)"
    )
    refresh: Count = setting(100, "rounds after which the reference of svrg moves to the iterate")


class DownlinkConfig(Section):
    """How the iterate comes back to the clients."""

    name: Literal["dense", "ef21-p"] = setting("dense", "the iterate in full, or compressed increments")
    compressor: str = setting("identity", "what shrinks an increment: a contractive one, such as topk or scaled-randk")
    k: Count | Share = setting(0.05, "coordinates sent, as for the uplink")
    levels: Count = setting(127, "levels of qsgd")
    rank: Count = setting(1, "rank of lowrank")


class StartConfig(Section):
    """Where chains begin."""

    at: Literal["mode", "zeros", "prior"] = setting("mode", "centre of the starting points, or a prior draw")
    scale: NonNegative = setting(2.0, "spread around the mode, in posterior standard deviations")


class FleetConfig(Section):
    """Where clients run, and how they fail."""

    name: Literal["local", "flower", "grpc"] = setting(
        "local", "one process, Flower's runtime, or devices (grpc: `fedsample server` sets it)"
    )
    engine: Literal["auto", "batched", "stacked", "compiled", "cuda-graph", "by-client"] = setting(
        "auto",
        "clients all at once, in runs that fit the cache, by C++ compiled here, as CUDA graphs, or one by one as on "
        "devices; auto: by the shapes",
    )
    tune: bool = setting(False, "whether a stopwatch chooses the engine where it is auto; it may choose differently")
    participation: Count | Share = setting(
        1.0, "0.6: each client takes part with that probability; 6: six drawn each round; 1.0: all of them"
    )
    loss: Risk = setting(0.0, "probability that a reply is lost")
    dropout: Risk = setting(0.0, "probability a round that a present client leaves")
    dropout_rounds: Annotated[float, Field(ge=1)] = setting(10.0, "mean number of rounds that it stays away")
    snapshot_rounds: Count = setting(500, "grpc: rounds between two snapshots of the server and all devices")
    quorum: Count | Share = setting(
        1.0,
        "grpc: 0.8: a round goes on without the slowest fifth of the devices; 8: with eight; 1.0: waits for all",
    )
    deadline: Annotated[Positive | None, BeforeValidator(Word("none"))] = setting(
        None, "grpc: seconds that a round waits for all devices before the quorum is enough"
    )
    threads: Annotated[Count | None, BeforeValidator(Word("auto"))] = setting(
        None, "CPU threads; auto: as the machine and the shapes suggest"
    )
    device: str = setting(
        "cpu", "where tensors live", pattern=r"^(cpu|cuda(:\d+)?)$", examples=["cpu", "cuda", "cuda:0"]
    )


class MonitorConfig(Section):
    """What a run writes down while it goes."""

    every: Count = setting(100, "rounds between two lines of the log")
    checkpoint_seconds: NonNegative = setting(5.0, "seconds between two checkpoints")
    tensorboard: bool = setting(True, "whether to write TensorBoard event files")


class Experiment(Section):
    """One experiment, complete: the preset's row fills what is not given.

    Raises:
        ConfigError: lists every setting that cannot be used.
    """

    preset: str = setting(DEFAULT, "row of the preset table that fills what is not set here")
    seed: int = setting(0, "seed of every draw", ge=0, lt=2**63)
    rounds: Count = setting(8000, "rounds of the chain, warm-up included")
    warmup: int = setting(1000, "rounds thrown away at the start", ge=0)
    thin: Count = setting(5, "rounds from one kept draw to the next")
    chains: Count = setting(4, "independent chains, run side by side")
    temperature: NonNegative = setting(1.0, "T in exp(-U / T); 1 is the posterior, 0 gradient descent")
    dtype: Literal["float32", "float64"] = setting("float32", "precision of the chain")
    step_size: Positive | Literal["auto"] | ScheduleConfig = setting(
        "auto", "step of the sampler, or a table with a schedule; auto: from the curvature"
    )
    bias_tolerance: Positive = setting(0.1, "relative bias of the variance that an automatic step may predict")
    batch_size: Annotated[Count | None, BeforeValidator(Word("all"))] = setting(
        None, "rows that a client draws for each gradient"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    metric: MetricConfig = MetricConfig()
    uplink: UplinkConfig = UplinkConfig()
    downlink: DownlinkConfig = DownlinkConfig()
    start: StartConfig = StartConfig()
    fleet: FleetConfig = FleetConfig()
    monitor: MonitorConfig = MonitorConfig()

    def __init__(self, /, **values: Any) -> None:
        """Check everything that is given, nested as the TOML is."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_problems(error)) from None

    @property
    def draws(self) -> int:
        """Draws kept of each chain: one every `thin` rounds after the warm-up."""
        return (self.rounds - self.warmup) // self.thin

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Lay what is given over the preset's row, and add what it implies."""
        given = _plain(values)
        name = given.get("preset", DEFAULT)
        uplink = given.get("uplink")
        if isinstance(uplink, Mapping) and uplink.get("name") == "dense":  # a preset's compressor does not go with it
            given["uplink"] = {"compressor": "identity", **uplink}
        downlink = given.get("downlink")
        if isinstance(downlink, Mapping) and downlink.get("name") == "dense":
            given["downlink"] = {"compressor": "identity", **downlink}
        return _imply(_merge(preset(name).overrides, given) if isinstance(name, str) else given)

    @model_validator(mode="after")
    def _agree(self) -> Experiment:
        """Refuse settings that are each allowed but contradict one another."""
        problems = list(_contradictions(self))
        if problems:
            raise SettingsError(problems)
        return self


# --- values ---------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A copy in TOML's own types: sections to dicts, tuples to lists, paths to text, numpy scalars to numbers."""
    if isinstance(value, BaseModel):
        return _plain({name: getattr(value, name) for name in value.model_fields_set})
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


_TABLES = {"step_size"}  # settings whose value may be a table, and which stay one setting


def _flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{path}{key}" not in _TABLES:
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same setting: 1 (one of them) and 1.0 (all of them) do not."""
    return bool(one == other) and type(one) is type(other)


# What other settings decide where nothing is said; of a complete experiment it is said, even where it is a default.
_IMPLIED = {"data.name", "data.partition", "model.name", "model.prior_scale"}


def _imply(values: dict[str, Any]) -> dict[str, Any]:
    """Add what the kind of data implies where the user said nothing, and make the path of the data absolute."""
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


def _contradictions(e: Experiment) -> Iterator[_Problem]:
    """What no field can see alone."""
    data, model, fleet = e.data, e.model, e.fleet
    if e.warmup >= e.rounds:
        yield _Problem(
            "warmup", f"{e.warmup} rounds of warm-up leave none of {e.rounds}; lower it, to {e.rounds // 5} say"
        )
    elif e.draws < 1:
        yield _Problem("thin", f"no draw in {e.rounds - e.warmup} rounds with one every {e.thin}; lower thin")
    if data.kind == "builtin":
        if data.name is None:
            yield _Problem("data.name", "missing; name one of `fedsample list datasets`, or set data.kind")
        if data.file is not None:
            kind = {".npz": "npz", ".parquet": "parquet"}.get(Path(data.file).suffix, "csv")
            yield _Problem("data.file", f'built-in data reads no file; set data.kind = "{kind}", or drop data.file')
    elif data.file is None and fleet.name != "grpc":
        yield _Problem("data.file", f'missing; data.kind = "{data.kind}" needs the path of its file')
    if data.kind in ("csv", "parquet"):
        if data.target is None and fleet.name != "grpc":
            yield _Problem("data.target", f'missing; data.kind = "{data.kind}" needs the name of the label column')
        if (data.client_column is not None) != (data.partition == "natural"):
            yield _Problem("data.client_column", 'goes with data.partition = "natural": give both or none')
    else:
        for key in ("target", "client_column"):
            if getattr(data, key) is not None:
                yield _Problem(f"data.{key}", f'only csv and parquet have it; drop it for data.kind = "{data.kind}"')
    if data.features is not None and data.kind in ("npz", "quadratic"):
        yield _Problem("data.features", f'its columns have no names; drop it for data.kind = "{data.kind}"')
    if data.labels is not None and data.kind == "quadratic":
        yield _Problem("data.labels", 'there is nothing to predict; drop it for data.kind = "quadratic"')
    if (data.kind == "quadratic") != (model.name == "quadratic"):
        advice = "drop model.name" if data.kind == "quadratic" else 'it needs data.kind = "quadratic"'
        yield _Problem("model.name", f'got "{model.name}" with data.kind = "{data.kind}"; {advice}')
    patient = fleet.quorum == 1.0 and isinstance(fleet.quorum, float)
    if fleet.deadline is not None and patient:
        yield _Problem("fleet.deadline", "needs a fleet.quorum below all devices, such as 0.8, that is enough after it")
    if fleet.name != "grpc" and not patient:
        yield _Problem("fleet.quorum", f'simulated devices are never slow; drop it for fleet "{fleet.name}"')
    if isinstance(fleet.quorum, int) and fleet.quorum > data.clients:
        yield _Problem("fleet.quorum", f"got {fleet.quorum} of {data.clients} clients; ask for fewer")
    if e.start.at == "prior" and model.prior_scale is None:
        yield _Problem("start.at", 'a flat prior cannot be drawn from; set model.prior_scale, or start at "mode"')
    if e.uplink.p is not None and e.uplink.name != "marina":
        yield _Problem("uplink.p", f'only marina has full rounds; set uplink.p = "auto" for uplink "{e.uplink.name}"')
    reduction = e.uplink.variance_reduction
    if reduction != "none" and e.batch_size is None and e.uplink.name != "direct":
        yield _Problem(
            "uplink.variance_reduction",
            f'"{reduction}" reduces the variance of minibatches, and there are none; set batch_size, or drop it',
        )
    dealt = data.kind in ("builtin", "csv", "parquet") and data.partition != "natural"
    if dealt and isinstance(fleet.participation, int) and fleet.participation > data.clients:
        yield _Problem("fleet.participation", f"got {fleet.participation} of {data.clients} clients; ask for fewer")


# --- errors ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One setting that cannot be used: its dotted path, and why."""

    path: str
    text: str


class SettingsError(ConfigError):
    """Everything wrong with a configuration, one line a setting.

    Args:
        problems: what is wrong, in the order of the settings.
        origins: dotted path to who set it, where known.
    """

    def __init__(self, problems: Sequence[_Problem], origins: Mapping[str, str] | None = None) -> None:
        """Write the message."""
        self.problems = problems
        by = origins or {}
        lines = []
        for path, text in problems:
            origin = next((by[key] for key in by if key == path or key.startswith(f"{path}.")), None)
            lines.append(f"{path}: {text}" + (f" (set by {origin})" if origin else ""))
        head = f"{len(lines)} settings cannot be used:\n  " if len(lines) > 1 else ""
        super().__init__(head + "\n  ".join(lines))


def _problems(error: ValidationError) -> list[_Problem]:
    """Pydantic's findings, one a setting, in the words of the fields."""
    found: dict[str, _Problem] = {}
    for item in error.errors(include_url=False, include_context=False):
        first, *rest = (str(part) for part in item["loc"])
        if first in _TABLES and isinstance(item["input"], Mapping) and rest and rest[0] != ScheduleConfig.__name__:
            continue  # it is a table: what is wrong inside is found too
        path = f"{first}.{rest[0]}" if rest and first in _sections() else first
        if item["type"] == "extra_forbidden":
            known = nearest(path, isinstance(item["input"], Mapping)) if path not in _TABLES else _near(rest[-1])
            text = f"unknown key; the nearest known key is {known}"
        elif path in _sections():
            text = f"got {_literal(item['input'])}; expected a table of settings"
        else:
            text = _refused(path, [str(part) for part in item["loc"]][1:], item["input"])
        found.setdefault(path, _Problem(path, text))
    return list(found.values())


def _refused(path: str, below: Sequence[str], got: Any) -> str:
    """What is wrong with a value, or with one inside a table that stands for one setting."""
    inside = below[-1] if path in _TABLES and below else ""
    field = ScheduleConfig.model_fields.get(inside) or next(
        (field for name, field in ScheduleConfig.model_fields.items() if path in _TABLES and name in below), None
    )
    if field is None:
        return f"got {_literal(got)}; expected {_allowed_at(path)}{_hint(path, got)}"
    name = next(name for name, each in ScheduleConfig.model_fields.items() if each is field)
    return f"got {name} = {_literal(got)}; expected {_allowed(field.annotation, field)}"


def _near(name: str) -> str:
    """The key of a schedule most like an unknown one."""
    return max(ScheduleConfig.model_fields, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())


def _hint(path: str, got: Any) -> str:
    """What else to say about a value that was refused."""
    if path == "fleet.name" and got == "ray":
        return f'; "{got}" is not part of this version, "local" runs the same chain in one process'
    if isinstance(got, str):
        words = [word for word in get_args(_fields()[path].annotation) if isinstance(word, str)]
        close = difflib.get_close_matches(got, words, n=1)
        if close:
            return f'; did you mean "{close[0]}"?'
        value = _number(got)
        if value is not None:
            return f"; write it without quotes and as TOML does: {_literal(value)}"
    return ""


def _number(text: str) -> float | bool | None:
    """The number or truth value that was written as text, if it is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return None


def _literal(value: Any) -> str:
    """A value as TOML writes it, tables inline; as Python does where TOML cannot."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    try:
        return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")
    except (TypeError, ValueError):
        return repr(value)


def nearest(path: str, table: bool = False) -> str:
    """The known key (or section, for a table) most like an unknown one: in whole, in its last part, in its section."""
    section, _, last = path.rpartition(".")

    def score(known: str) -> float:
        place, _, name = known.rpartition(".")
        likeness = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in ((path, known), (last, name)))
        return sum(likeness) + (0.5 if section and section == place else 0)

    return max(_sections() if table else _fields(), key=score)


# --- the list of settings -------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """One setting: dotted path, environment variable, what is allowed, default (as in TOML; "" is unset), meaning."""

    path: str
    variable: str
    allowed: str
    default: str
    meaning: str


def keys() -> list[Key]:
    """Every setting, in the order of the TOML file."""
    defaults = dict(_flatten(Experiment().model_dump()))
    return [
        Key(path, variable(path), _allowed_at(path), _written(path, defaults[path]), field.description or "")
        for path, field in _fields().items()
    ]


def variable(path: str) -> str:
    """The environment variable that sets a key: FEDSAMPLE_UPLINK__K for uplink.k."""
    return PREFIX + path.replace(".", "__").upper()


@cache
def _sections() -> dict[str, type[Section]]:
    """Name and class of each table."""
    kinds = ((name, field.annotation) for name, field in Experiment.model_fields.items())
    return {name: kind for name, kind in kinds if isinstance(kind, type) and issubclass(kind, Section)}


@cache
def _fields() -> dict[str, FieldInfo]:
    """Dotted path and field of each setting, top level first."""
    top = {name: field for name, field in Experiment.model_fields.items() if name not in _sections()}
    below = {f"{name}.{key}": f for name, table in _sections().items() for key, f in table.model_fields.items()}
    return {**top, **below}


def _word(path: str) -> str:
    """What stands for None at this path; empty where it is left out."""
    functions = (m.func for m in _fields()[path].metadata if isinstance(m, BeforeValidator))
    return next((function.text for function in functions if isinstance(function, Word)), "")


def _written(path: str, value: Any) -> str:
    """The value as TOML; empty for None that is said by leaving the key out."""
    if value is None:
        return f'"{_word(path)}"' if _word(path) else ""
    return _literal(value)


def _allowed_at(path: str) -> str:
    """What a setting accepts, in words, from its own annotation."""
    field = _fields()[path]
    word = _word(path)
    return _allowed(field.annotation, field) + (f' or "{word}"' if word else "")


def _allowed(annotation: Any, field: FieldInfo | None = None) -> str:
    """An annotation in words; `field` carries the bounds that stand beside it."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _allowed(arguments[0], next((a for a in arguments[1:] if isinstance(a, FieldInfo)), None))
    if kind in (Union, types.UnionType):
        return " or ".join(_allowed(part) for part in arguments if part is not type(None))
    if kind is Literal:
        return ("" if len(arguments) == 1 else "one of ") + ", ".join(f'"{word}"' for word in arguments)
    if kind is list:
        return f"a list, each {_allowed(arguments[0])}"
    if isinstance(kind := annotation, type) and issubclass(kind, BaseModel):
        return "a table with " + ", ".join(kind.model_fields)
    if field is not None and field.examples:
        return "text such as " + ", ".join(f'"{example}"' for example in field.examples)
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(signs[s], getattr(m, s)) for m in (field.metadata if field else ()) for s in signs if hasattr(m, s)]
    return name + " and".join(f" {sign} {bound}" for sign, bound in found)


# --- in and out -----------------------------------------------------------------------------------------------------

Source = Mapping[str, Any] | str | Path | Experiment | None


def load(
    source: Source = None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Experiment:
    """The experiment that a source describes, with environment and overrides laid over it.

    Args:
        source: a dict nested as the TOML is, the path of a TOML file, or None for the defaults. An `Experiment` is
            complete: the environment is not asked, and overrides may even change its preset.
        overrides: "section.key=value", as for --set; the value is a TOML literal or a bare word.
        environment: where `FEDSAMPLE_*` is looked up; None: `os.environ`; {}: nowhere, as when a run is resumed.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, settings that contradict one another.
    """
    return trace(source, overrides, environment)[0]


def trace(
    source: Source = None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[Experiment, dict[str, str]]:
    """As `load`, and who set each value that is not the default: {"uplink.k": "FEDSAMPLE_UPLINK__K", ...}."""
    layers = [_from_source(source)]
    if not isinstance(source, Experiment):
        layers += _from_environment(os.environ if environment is None else environment)
    layers += [_from_override(text) for text in overrides]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        values = _merge(values, layer)
        origins.update({path: origin for path, _ in _flatten(layer)})
    try:
        experiment = Experiment(**values)
    except SettingsError as error:
        raise SettingsError(error.problems, origins) from None
    default = dict(_flatten(Experiment().model_dump()))
    row = dict(_flatten(preset(experiment.preset).overrides))
    changed = [path for path, value in _flatten(experiment.model_dump()) if not _same(value, default[path])]
    preset_origin = f"preset {experiment.preset}"
    return experiment, {p: origins.get(p, preset_origin if p in row else "implied by data") for p in changed}


def _from_source(source: Source) -> tuple[str, dict[str, Any]]:
    """Where the first layer comes from, and the layer."""
    if source is None:
        return "default", {}
    if isinstance(source, Experiment):
        base = dict(_flatten(Experiment(preset=source.preset).model_dump()))
        layer: dict[str, Any] = {"preset": source.preset}
        implied = _IMPLIED | {
            f"{link}.compressor"
            for link in ("uplink", "downlink")
            if getattr(source, link).name != base[f"{link}.name"]
        }
        for path, value in _flatten(source.model_dump()):
            if not _same(value, base[path]) or path in implied:
                layer = _merge(layer, _nest(path, value))
        return "the experiment", layer
    if isinstance(source, Mapping):
        return "the dict", _plain(source)
    if isinstance(source, str | Path):
        return str(source), _from_file(Path(source))
    raise ConfigError(f"got a {type(source).__name__}; expected a dict, the path of a TOML file, or an Experiment")


def _from_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = "`fedsample config init` writes one"
        if str(path) in PRESETS:
            advice = f'to use the preset of that name: --preset {path}, or {{"preset": "{path}"}} from Python'
        raise ConfigError(f"{path}: there is no such configuration file; {advice}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory; name the TOML file in it, such as {path / 'config.toml'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    file = values.get("data", {}).get("file") if isinstance(values.get("data"), dict) else None
    if isinstance(file, str) and file and (path.parent / file).exists():
        values["data"]["file"] = str(path.parent / file)
    return values


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """One layer a variable of ours."""
    known = {variable(path): path for path in _fields()}
    ours = sorted(name for name in environment if name.startswith(PREFIX))
    unknown = [name for name in ours if name not in known]
    if unknown:
        close = [variable(nearest(name.removeprefix(PREFIX).lower().replace("__", "."))) for name in unknown]
        text = "unknown environment variable; the nearest known one is "
        raise SettingsError([_Problem(name, text + near) for name, near in zip(unknown, close, strict=True)])
    return [(name, _nest(known[name], _value(environment[name]))) for name in ours]


def _from_override(text: str) -> tuple[str, dict[str, Any]]:
    """The layer of one `section.key=value`."""
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise ConfigError(f"--set {text}: expected section.key=value, such as uplink.k=32 or rounds=2000")
    return f"--set {text}", _nest(path.strip(), _value(value.strip()))


def _nest(path: str, value: Any) -> dict[str, Any]:
    """{"uplink": {"k": value}} for "uplink.k"."""
    first, _, rest = path.partition(".")
    return {first: _nest(rest, value) if rest else value}


def _value(text: str) -> Any:
    """A TOML literal where the text is one, else the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def dump_toml(experiment: Experiment, origins: Mapping[str, str] | None = None) -> str:
    """Every resolved value as TOML: `load(tomllib.loads(dump_toml(e))) == e`.

    Args:
        experiment: what to write.
        origins: path to remark, written as a comment behind the value (see `trace`).
    """
    lines = []
    section = ""
    for path, value in _flatten(experiment.model_dump()):
        table, _, key = path.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        if text := _written(path, value):
            remark = (origins or {}).get(path)
            lines.append(f"{key} = {text}" + (f"  # {remark}" if remark else ""))
    return "\n".join(lines) + "\n"


def template() -> str:
    """A TOML file of the default job: the preset is set, every other key is there as a comment with its meaning."""
    lines = ["# An experiment of fedsample. Keys in comments show their defaults; uncomment one to change it.", ""]
    section = ""
    for key in keys():
        table, _, name = key.path.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines += textwrap.wrap(f"{key.meaning} ({key.allowed})", 96, initial_indent="# ", subsequent_indent="#   ")
        lines.append(f"{name} = {key.default}" if name == "preset" else f"# {name} = {key.default}".rstrip())
    return "\n".join(lines) + "\n"
