"""Rounds with devices over gRPC against bare streams: same TLS, same processes, same sizes, one connection per device.

    python simulations/benchmarks/devices.py [--devices 2 16 64] [--large 2500000 25000000] [--rounds 200] [--json]

All devices share one other process. A bare round sends every device as many bytes as a request of ours has, and waits
for as many as an answer has, over bidirectional streams of `grpc.aio` with arbitrary content; messages above 1 MiB go
in pieces of that size or whole, whichever is faster. Ours is `GrpcFleet.exchange` of dense gradients of a quadratic.
The two alternate; the best of each counts. `working` are bare streams that also do the work: their devices compute the
gradients, and their server sums them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import show

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
METHOD = "/bare.Stream/Connect"
PIECE = 1 << 20


# --- the other process ------------------------------------------------------------------------------------------------


async def bare_devices(target: str, certs: Path, count: int) -> None:
    """Answer every message with as many bytes as it says."""
    import grpc

    from fedsample.fleets.grpc.security.credentials import client_credentials

    async def one(index: int) -> None:
        options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(target, client_credentials(certs / f"client-{index}"), options) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(b"")
            expected, got = -1, 0
            while (message := await call.read()) is not grpc.aio.EOF:
                if expected < 0:  # first: how much comes down, how much goes up, in how large parts, of how many values
                    down, up, part, d = (int.from_bytes(message[at : at + 8], "little") for at in (0, 8, 16, 24))
                    expected, got, whole = down, 0, bytearray()
                got += len(message)
                if d:
                    whole += message
                if got >= expected:
                    answer = gradient(whole, d, up, index) if d else bytes(min(part, up))
                    for at in range(0, up, part):
                        await call.write(answer[at : at + part] if d else answer[: up - at])
                    expected = -1

    await asyncio.gather(*(one(index) for index in range(count)))


def gradient(message: bytearray, d: int, up: int, index: int, kept: dict[tuple[int, int], Any] = {}) -> bytes:  # noqa: B006
    """Compute by hand what our devices compute: the gradient of a quadratic at the message's last values."""
    import torch

    if (index, d) not in kept:
        kept[index, d] = torch.ones(d), torch.zeros(d)
    curvature, center = kept[index, d]
    point = torch.frombuffer(message, dtype=torch.float32, count=d, offset=len(message) - 4 * d)
    found = curvature * (point - center)
    return bytes(up - 4 * d) + found.numpy().tobytes()


async def our_devices(target: str, certs: Path, count: int, file: Path, state: Path) -> None:
    """Run devices that take part in every run."""
    from fedsample.clients.device_data import DataSource, DeviceData
    from fedsample.config.loading import reread
    from fedsample.fleets.grpc.device.connection import Connection, prepare_threads
    from fedsample.fleets.grpc.device.replica import Replica
    from fedsample.fleets.grpc.security.credentials import client_credentials

    def connection(index: int) -> Connection:
        def found(welcome: Any) -> Replica:
            prepare_threads(1)
            experiment = reread(welcome.config)
            held = DeviceData(experiment, index, count, DataSource(str(file), None, index, count))
            return Replica(state / str(index), welcome.run, experiment, index, count, held)

        return Connection(target, client_credentials(certs / f"client-{index}"), index, found)

    await asyncio.gather(*(connection(index).attend() for index in range(count)))


# --- bare streams -----------------------------------------------------------------------------------------------------


class Bare:
    """A server of bare streams with arbitrary content."""

    def __init__(self, certs: Path, count: int) -> None:
        self.loop, self.count = asyncio.new_event_loop(), count
        self.contexts: list[Any] = []
        self.ready = threading.Event()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = asyncio.run_coroutine_threadsafe(self.open(certs), self.loop).result()

    async def open(self, certs: Path) -> int:
        """Listen -> the port."""
        import grpc

        from fedsample.fleets.grpc.security.credentials import server_credentials

        async def connect(request: Any, context: Any) -> None:
            await context.read()
            self.contexts.append(context)
            if len(self.contexts) == self.count:
                self.ready.set()
            await asyncio.Event().wait()

        service, name = METHOD[1:].split("/")
        handler = grpc.method_handlers_generic_handler(service, {name: grpc.stream_stream_rpc_method_handler(connect)})
        self.server = grpc.aio.server(options=OPTIONS)
        self.server.add_generic_rpc_handlers((handler,))
        port: int = self.server.add_secure_port("127.0.0.1:0", server_credentials(certs / "server"))
        await self.server.start()
        return port

    def round(self, down: int, up: int, part: int, d: int = 0) -> float:
        """Seconds of one exchange with everyone; with d, points of that size go down and gradients are summed."""
        return asyncio.run_coroutine_threadsafe(self.exchange(down, up, part, d), self.loop).result()

    async def exchange(self, down: int, up: int, part: int, d: int) -> float:
        """See `round`; in the loop's thread."""
        import torch

        head = b"".join(number.to_bytes(8, "little") for number in (down, up, part, d))
        zeros = bytes(min(part, down))
        points = torch.ones(d)
        start = time.perf_counter()
        message = head + bytes(down - len(head) - 4 * d) + points.numpy().tobytes() if d else b""

        async def one(context: Any) -> bytes | bytearray:
            for at in range(0, down, part):
                if d:
                    await context.write(message[at : at + part])
                else:
                    await context.write(head + zeros[len(head) :] if at == 0 else zeros[: down - at])
            got, whole = 0, bytearray()
            while got < up:
                piece = await context.read()
                got += len(piece)
                if d:
                    whole += piece
            return whole

        answers = await asyncio.gather(*(one(context) for context in self.contexts))
        if d:
            total = torch.zeros(d)
            for answer in answers:
                total += torch.frombuffer(answer, dtype=torch.float32, count=d, offset=len(answer) - 4 * d)
        return time.perf_counter() - start

    def close(self) -> None:
        """Stop."""
        asyncio.run_coroutine_threadsafe(self.server.stop(0), self.loop).result()


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """A hub with a fleet whose devices hold quadratics."""

    def __init__(self, certs: Path, count: int, d: int, file: Path) -> None:
        from fedsample.config import dump_toml, load
        from fedsample.data.device_files import agreed_schema
        from fedsample.data.schema import Schema
        from fedsample.estimators import build_links
        from fedsample.fleets.grpc.framing.version import run_id
        from fedsample.fleets.grpc.security.credentials import server_credentials
        from fedsample.fleets.grpc.server.dispatcher import Dispatcher
        from fedsample.fleets.grpc.server.fleet import fleet_on, gather
        from fedsample.fleets.grpc.server.host import _agree, _certified
        from fedsample.fleets.grpc.server.hub import Hub
        from fedsample.fleets.grpc.server.streams import Invitation
        from fedsample.problem.remote import remote_problem

        values = {
            "preset": "federated-gd",
            "chains": 1,
            "data": {"kind": "quadratic", "file": str(file), "clients": count},
        }
        self.experiment, nonce = load(values, ["fleet.name=grpc"], {}), os.urandom(16)
        config = dump_toml(self.experiment)
        invitation = Invitation(run_id(nonce, config), nonce, config, count)
        self.hub = Hub(invitation, "127.0.0.1:0", server_credentials(certs / "server"), _certified)
        self.hub.start()
        self.d, self.number = d, 0

        def begin() -> None:
            dispatcher = Dispatcher(self.hub)
            schemas = gather(self.hub)
            agreed = agreed_schema(self.experiment, [Schema.from_json(text) for text in schemas.values()])
            _agree(dispatcher, agreed)
            clients = remote_problem(self.experiment, agreed, count).clients
            self.fleet = fleet_on(dispatcher, self.experiment, clients, build_links(self.experiment, clients))

        self.begin = begin

    def round(self) -> float:
        """Seconds of one exchange with everyone."""
        import torch

        from fedsample.protocol.exchange import ESTIMATE, Request

        self.number += 1
        points = torch.full((1, self.d), float(self.number))
        start = time.perf_counter()
        self.fleet.exchange(Request(self.number, points, frozenset({ESTIMATE})))
        return time.perf_counter() - start

    def sizes(self) -> tuple[int, int]:
        """Bytes down and up of one round with one device."""
        record = self.hub.records[0]
        before = record.sent[1], record.received[1]
        self.round()
        return record.sent[1] - before[0], record.received[1] - before[1]


def compare(count: int, d: int, rounds: int) -> dict[str, Any]:
    """Make one row for this number of devices and points of d float32."""
    import numpy as np

    from fedsample.fleets.grpc.security import cert_folders

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cert_folders.init(folder / "certs", ["localhost"], count)
        file = folder / "potentials.npz"
        np.savez(file, lam=np.ones((count, d)), a=np.zeros((count, d)))
        bare, ours = Bare(folder / "certs", count), Ours(folder / "certs", count, d, file)
        command = [sys.executable, __file__, "--pool", str(count), str(bare.port), str(ours.hub.port), name]
        pool = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            ours.begin()
            bare.ready.wait(60)
            down, up = ours.sizes()
            parts = {PIECE, max(down, up)} if max(down, up) > PIECE else {max(down, up)}
            best = {"bare": float("inf"), "working": float("inf"), "ours": float("inf")}
            for _ in range(5):
                for part in parts:
                    bare.round(down, up, part)
                    for name, size in (("bare", 0), ("working", d)):
                        spent = [bare.round(down, up, part, size) for _ in range(rounds)]
                        best[name] = min(best[name], float(np.median(spent)))
                ours.round()
                best["ours"] = min(best["ours"], float(np.median([ours.round() for _ in range(rounds)])))
        finally:
            pool.kill()
            pool.wait()
            ours.hub.stop("measured", finished=True)
            bare.close()
    return {
        "devices": count, "parameters": d, "bytes_down": down, "bytes_up": up,
        "bare_ms": round(1e3 * best["bare"], 3), "working_ms": round(1e3 * best["working"], 3),
        "ours_ms": round(1e3 * best["ours"], 3), "times_bare": round(best["ours"] / best["bare"], 2),
        "times_working": round(best["ours"] / best["working"], 2), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def measure(
    devices: Sequence[int] = (2, 16, 64), large: Sequence[int] = (2_500_000, 25_000_000), rounds: int = 200
) -> list[dict[str, Any]]:
    """Small messages for each number of devices, then large ones with two devices."""
    small = [compare(count, 1000, rounds) for count in devices]
    return small + [compare(2, d, max(3, rounds // 40)) for d in large]


async def pool(count: int, bare: int, ours: int, folder: Path) -> None:
    """Both kinds of devices, in one loop."""
    certs, file = folder / "certs", folder / "potentials.npz"
    kinds = [our_devices(f"127.0.0.1:{ours}", certs, count, file, folder / "state")]
    if bare:
        kinds.append(bare_devices(f"127.0.0.1:{bare}", certs, count))
    await asyncio.gather(*kinds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 16, 64])
    parser.add_argument("--large", type=int, nargs="*", default=[2_500_000, 25_000_000])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--flower", action="store_true", help="also Flower's deployed runtime: two minutes more")
    parser.add_argument("--pool", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pool:
        count, bare, ours, folder = options.pool
        asyncio.run(pool(int(count), int(bare), int(ours), Path(folder)))
        return
    import torch

    torch.set_num_threads(1)
    rows = measure(options.devices, options.large, options.rounds)
    if options.flower:
        import deployed

        rows += deployed.measure()
    show(rows, as_json=options.json)


if __name__ == "__main__":
    main()
