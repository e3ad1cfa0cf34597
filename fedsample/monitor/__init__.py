"""Output of a run: its directory, draws, checkpoints, curves, progress and final table.

Importing this package loads neither torch nor TensorBoard: both come in with the first call that needs them.
"""

from fedsample.monitor.checkpoint import Checkpoint, CheckpointStore
from fedsample.monitor.directory import RunDirectory
from fedsample.monitor.draws import DrawStore, load_draws, load_rounds
from fedsample.monitor.jsonl import read_jsonl
from fedsample.monitor.progress import Progress
from fedsample.monitor.summary_table import summary_table
from fedsample.monitor.tensorboard import Recorder, quantiles

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "DrawStore",
    "Progress",
    "Recorder",
    "RunDirectory",
    "load_draws",
    "load_rounds",
    "quantiles",
    "read_jsonl",
    "summary_table",
]
