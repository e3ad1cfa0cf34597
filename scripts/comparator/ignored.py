"""The one list of what two runs of the same chain may differ in: everything else is compared to the bit."""

from __future__ import annotations

# summary.json: what a clock measured.
SUMMARY = ("seconds", "seconds_per_round", "seconds_in_all")

# metrics.jsonl: what a clock measured, and what a thread evaluates when it comes round to it, or drops where it is
# behind. The final values of the latter (R-hat, ESS, scores) stand in summary.json, which is compared.
METRICS = ("time/", "mcmc/rhat/", "mcmc/ess/", "round/")

# metrics.jsonl of real devices: bytes of frames as sent, which hold pings, and what a clock decides.
DEVICE_METRICS = ("comm/wire_", "fleet/late", "fleet/failed", "fleet/reconnections", "comm/wire")

# geometry.json: sums of files, and names of the configuration, which are made from its keys.
GEOMETRY = ("configurations", "sha256")

# Fields of protobuf frames between a server and its devices, by (frame, field).
FRAMES = {
    ("hello", "software"): "a version",
    ("hello", "instance"): "random bytes of a process",
    ("welcome", "software"): "a version",
    ("welcome", "run"): "made from the nonce",
    ("welcome", "nonce"): "random bytes of a run",
    ("ready", "run"): "made from the nonce",
    ("name", "run"): "made from the nonce",
    ("name", "digest"): "made from the mark of a snapshot, and from what is compared anyhow",
    ("field", "fedsample"): "a version",
    ("field", "mark"): "random bits of a snapshot",
}
CLOCKED_FRAMES = ("ping", "pong")  # sent when a clock says so

# Not looked at at all: env.json (versions, machine, git revision), lock (process), TensorBoard's files (times; their
# values are those of metrics.jsonl), checkpoint/ (its format may change; a resumed run is what shows that it is whole).
