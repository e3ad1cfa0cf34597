"""Uplink and downlink estimators: how gradients reach the server, and how clients get the iterate."""

from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload
from fedsample.estimators.dense import Dense
from fedsample.estimators.diana import Diana
from fedsample.estimators.direct import Direct
from fedsample.estimators.downlink import DenseDownlink, Downlink, Ef21P
from fedsample.estimators.ef21 import Ef21
from fedsample.estimators.links import Links, build_links
from fedsample.estimators.marina import Marina
from fedsample.estimators.soundness import build, build_downlink, check, table

__all__ = [
    "Dense",
    "DenseDownlink",
    "Diana",
    "Direct",
    "Downlink",
    "Ef21",
    "Ef21P",
    "Links",
    "Marina",
    "Memory",
    "Oracle",
    "ServerState",
    "Turn",
    "Uplink",
    "Upload",
    "build",
    "build_downlink",
    "build_links",
    "check",
    "table",
]
