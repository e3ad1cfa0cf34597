"""The settings of an experiment: default, range and meaning of each, documented here and only here.

Error messages, `config init` and `config show --help` are made from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedsample.config.presets import DEFAULT


class Word:
    """Validator for a word that means None, since TOML has no null.

    Args:
        text: the word; empty: None is written by leaving the key out.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, value: Any) -> Any:
        """Return None for the word, anything else unchanged."""
        return None if value == self.text and isinstance(value, str) else value


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Risk = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str | None, BeforeValidator(Word(""))]


def setting(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declare a field with its default, its meaning and its bounds."""
    return Field(default, description=meaning, **bounds)


class Section(BaseModel):
    """A table of settings: immutable, without unknown keys or silent conversion (true and "5" are not numbers)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """The clients' data."""

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
    """Step-size schedule."""

    schedule: Literal["constant", "polynomial", "cyclical"] = setting("polynomial", "how the step changes")
    initial: Positive | Literal["auto"] = setting("auto", "the step of round 1; auto: from the curvature")
    power: Positive = setting(0.55, "polynomial: h (1 + (round - 1) / offset)^-power")
    offset: Positive = setting(1000.0, "polynomial: rounds in which the step falls by 2^-power")
    period: Count = setting(1000, "cyclical: rounds of a cosine cycle")


class SamplerConfig(Section):
    """The sampler: transition kernel of the chains."""

    name: Literal["baoab", "langevin", "sghmc"] = setting("baoab", "transition kernel, see `fedsample list samplers`")
    friction: Positive = setting(1.0, "friction of baoab and sghmc, per unit of time in whitened coordinates")


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
    """How clients get the iterate."""

    name: Literal["dense", "ef21-p"] = setting("dense", "the iterate in full, or compressed increments")
    compressor: str = setting("identity", "what shrinks an increment: a contractive one, such as topk or scaled-randk")
    k: Count | Share = setting(0.05, "coordinates sent, as for the uplink")
    levels: Count = setting(127, "levels of qsgd")
    rank: Count = setting(1, "rank of lowrank")


class StartConfig(Section):
    """Starting points of the chains."""

    at: Literal["mode", "zeros", "prior"] = setting("mode", "centre of the starting points, or a prior draw")
    scale: NonNegative = setting(2.0, "spread around the mode, in posterior standard deviations")


class FleetConfig(Section):
    """Where clients run, and which failures are simulated or allowed."""

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
    dropout: Risk = setting(0.0, "probability per round that a present client leaves")
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
    """What a run records while it goes."""

    every: Count = setting(100, "rounds between two lines of the log")
    checkpoint_seconds: NonNegative = setting(5.0, "seconds between two checkpoints")
    tensorboard: bool = setting(True, "whether to write TensorBoard event files")


class Settings(Section):
    """All settings: the top level of the TOML file, and its tables."""

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
