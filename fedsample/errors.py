"""The exception tree: errors say what was got, what was expected and what to do."""

from __future__ import annotations


class FedSampleError(Exception):
    """Base of every error that fedsample raises on purpose; the command line prints it without a traceback.

    Attributes:
        exit_code: exit code of the command line: 1 failed, 2 usage, 3 quorum lost, 130 interrupted.
    """

    exit_code = 1


class ConfigError(FedSampleError):
    """An invalid configuration: unknown key, wrong type, value out of range."""

    exit_code = 2


class UnsoundError(ConfigError):
    """A combination of sampler, uplink, compressor and participation that targets another law, or none."""


class DataError(FedSampleError):
    """Invalid data: a missing file or column, NaN, labels out of range."""


class RunDirectoryError(FedSampleError):
    """A run directory that cannot be written, is not empty, or belongs to another configuration."""


class AddressError(ConfigError):
    """An invalid address, or one on which plaintext is refused."""


class CertificateError(FedSampleError):
    """An unusable key, certificate or request: missing, expired, of the wrong role, readable by others."""


class DivergenceError(FedSampleError):
    """A chain diverged: the step is too large for the curvature at its positions, or for the compression noise."""


class QuorumError(FedSampleError):
    """Too few clients answered to complete a round."""

    exit_code = 3


class CompileError(FedSampleError):
    """Gradients cannot be compiled or recorded: no compiler or GPU, a failure of either, or unsupported clients."""


class DeviceMemoryError(FedSampleError):
    """A device's memory is too small for one client's computation, or for what all clients keep."""


class ClientError(FedSampleError):
    """A client failed; names the client, round and stage, and carries the client's own traceback.

    Args:
        client: index of the client, 0 <= client < n.
        round: the round in which it failed.
        stage: what it was doing ("gradient", "encode", ...).
        detail: the client's own error or traceback, verbatim.
    """

    def __init__(self, client: int, round: int, stage: str, detail: str) -> None:
        super().__init__(f"client {client} failed in round {round} while computing its {stage}:\n{detail}")
        self.client, self.round, self.stage, self.detail = client, round, stage, detail


class Interrupted(FedSampleError):
    """The run was stopped by the user after it had checkpointed."""

    exit_code = 130
