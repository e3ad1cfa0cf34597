"""The exception tree: every error a user can meet says what was got, what was expected and what to do."""

from __future__ import annotations


class FedSampleError(Exception):
    """Base of every error that fedsample raises on purpose; the command line prints it without a traceback.

    Attributes:
        exit_code: what the command line exits with: 1 failed, 2 usage, 3 quorum lost, 130 interrupted.
    """

    exit_code = 1


class ConfigError(FedSampleError):
    """A configuration that cannot be meant: unknown key, wrong type, value out of range."""

    exit_code = 2


class UnsoundError(ConfigError):
    """A combination of sampler, uplink, compressor and participation that targets another law, or none."""


class DataError(FedSampleError):
    """Data that cannot be used: a missing file or column, NaN, labels out of range."""


class RunDirectoryError(FedSampleError):
    """A run directory that cannot be written, is not empty, or belongs to another configuration."""


class AddressError(ConfigError):
    """An address that cannot be meant, or one on which plaintext is refused."""


class CertificateError(FedSampleError):
    """A key, certificate or request that cannot be used: missing, expired, of the wrong role, readable by others."""


class DivergenceError(FedSampleError):
    """A chain left every bounded region: the step is too large for the curvature that it met."""


class QuorumError(FedSampleError):
    """Too few clients answered for the round to count."""

    exit_code = 3


class CompileError(FedSampleError):
    """Gradients that cannot be compiled or recorded: no compiler or GPU, it fails, or other clients."""


class DeviceMemoryError(FedSampleError):
    """A device whose memory does not hold what one client needs, or what all of them keep."""


class ClientError(FedSampleError):
    """A client failed; carries which one, in which round and stage, and the client's own traceback.

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
