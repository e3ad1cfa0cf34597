"""Many devices in one process, each with a connection of its own; when a run has ended they wait for the next one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedsample.clients.device_data import DataSource, DeviceData
from fedsample.config.loading import reread
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.device import connection
from fedsample.fleets.grpc.device.connection import Connection, prepare_threads
from fedsample.fleets.grpc.device.replica import Replica


def attendant(target: str, index: int, devices: int, state: Path, data: str) -> Connection:
    def found(welcome: pb.Welcome) -> Replica:
        prepare_threads(1)
        experiment = reread(welcome.config)
        own = data.endswith(".npz")
        source = DataSource(
            data, None, None if own and experiment.data.kind != "quadratic" else index, None if own else devices
        )
        held = DeviceData(experiment, index, devices, source)
        folder = state / f"{welcome.run.hex()}-{index}"
        return Replica(folder, welcome.run, experiment, index, devices, held)

    return Connection(target, None, index, found)


async def attend(target: str, devices: int, state: Path, data: str) -> None:
    async def one(index: int) -> None:
        device = attendant(target, index, devices, state, data)
        while True:
            await device.attend()

    await asyncio.gather(*(one(index) for index in range(devices)))


def run(target: str, devices: int, state: Path, data: str) -> None:
    """For a process of its own; between two runs it looks often for the next one."""
    connection.FIRST, connection.LONGEST = 0.05, 0.1
    asyncio.run(attend(target, devices, state, data))
