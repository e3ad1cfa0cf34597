"""Speed of compression: gigabytes of input per second and core, against a copy of the same memory in the same run.

    python simulations/benchmarks/compressors.py [--size 10000000] [--only randk ...] [--json]
    python simulations/benchmarks/compressors.py --device cuda [--compile]

On a CPU one thread encodes (compress, to_bytes) and decodes (from_bytes, decompress). Rates are bytes of the float32
input over the time of both, in processor time of the thread, which a busy machine disturbs less; wall-clock time is
reported too. Decoding makes a dense vector; `add` is the same with `add_to` a memory, as servers and clients do.
TopK is also compared with torch.topk on the magnitudes. On an accelerator, with torch alone, compress and decompress
are timed without bytes, against the bandwidth of a copy (bytes read and written).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from fedsample.compression import Compressor, PacketKeys, build
from fedsample.random import key

FRACTION = 0.05
NAMES = (
    ("randk", 127),
    ("randblock", 127),
    ("natural", 127),
    ("bf16", 127),
    ("sign", 127),
    ("qsgd", 127),
    ("qsgd", 7),
    ("topk", 127),
    ("randk+natural", 127),
    ("permk", 127),
    ("identity", 127),
)
TARGETS = {"randk", "randblock", "natural", "sign", "qsgd"}


def best(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(processor, wall-clock) seconds of the fastest of several calls, after one warm-up call."""
    work()
    times = []
    for _ in range(repeats):
        processor, wall = time.process_time(), time.perf_counter()
        work()
        times.append((time.process_time() - processor, time.perf_counter() - wall))
    return min(each[0] for each in times), min(each[1] for each in times)


def best_on_device(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call by the device's own clock."""
    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def keys_on(device: str) -> PacketKeys:
    own, common = (key(1, purpose=purpose, device=device) for purpose in ("own", "common"))
    return PacketKeys(own, common, 1, client=0, chain=0)


def on_cpu(names: list[tuple[str, int]], size: int, repeats: int) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    vector = key(0).normal(size, torch.float32)
    keys, gigabytes = keys_on("cpu"), 4 * size / 1e9
    memory = torch.zeros(size)
    clone, clone_wall = best(lambda: vector.clone(), repeats)
    copy, copy_wall = best(lambda: memory.copy_(vector), repeats)
    rows: list[dict[str, object]] = [
        {"name": "torch clone", "GB/s": gigabytes / clone, "wall GB/s": gigabytes / clone_wall},
        {"name": "torch copy_", "GB/s": gigabytes / copy, "wall GB/s": gigabytes / copy_wall},
    ]
    for name, levels in names:
        compressor = build(name, FRACTION, levels=levels, clients=20)
        packet = compressor.compress(vector, keys)
        data = compressor.to_bytes(packet)
        encode, encode_wall = best(lambda: compressor.to_bytes(compressor.compress(vector, keys)), repeats)  # noqa: B023
        parse = _parser(compressor, data, keys, size)
        decode, decode_wall = best(lambda: compressor.decompress(parse(), size), repeats)  # noqa: B023
        add, _ = best(lambda: compressor.add_to(memory, parse(), 1.0), repeats)  # noqa: B023
        row: dict[str, object] = {
            "name": name if name != "qsgd" else f"qsgd s={levels}",
            "encode ms": 1e3 * encode,
            "decode ms": 1e3 * decode,
            "GB/s": gigabytes / (encode + decode),
            "GB/s, add": gigabytes / (encode + add),
            "wall GB/s": gigabytes / (encode_wall + decode_wall),
            "times a clone": (encode + decode) / clone,
            "input/wire": 4 * size / len(data),
        }
        if name == "topk":
            k = compressor.count(size)
            plain, _ = best(lambda: torch.topk(vector.abs(), k, sorted=False), 2)  # noqa: B023
            row["times torch.topk"] = (encode + decode) / plain
        if name in TARGETS:
            row["1 GB/s"] = "yes" if row["GB/s"] >= 1 else "no"  # type: ignore[operator]
        rows.append(row)
    return rows


def _parser(compressor: Compressor, data: bytes, keys: PacketKeys, size: int) -> Callable[[], object]:
    return lambda: compressor.from_bytes(data, keys, size, torch.float32)


def on_device(names: list[tuple[str, int]], size: int, repeats: int, device: str, compiled: bool) -> list[dict]:  # type: ignore[type-arg]
    vector = key(0, device=device).normal(size, torch.float32)
    keys, memory = keys_on(device), torch.empty(size, device=device)
    copied = 8 * size / best_on_device(lambda: memory.copy_(vector), repeats)
    rows: list[dict[str, object]] = [{"name": "torch copy_", "GB/s": copied / 1e9}]
    for name, levels in names:
        compressor = build(name, FRACTION, levels=levels, clients=20)

        def both(compressor: Compressor = compressor) -> object:
            return compressor.decompress(compressor.compress(vector, keys), size)

        work = torch.compile(both) if compiled else both
        seconds = best_on_device(work, repeats)
        rate = 8 * size / seconds  # as for a copy: input read, output written
        label = name if name != "qsgd" else f"qsgd s={levels}"
        rows.append({"name": label, "ms": 1e3 * seconds, "GB/s": rate / 1e9, "of a copy": rate / copied})
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of compressors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="fuse by torch.compile, on an accelerator")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = [each for each in NAMES if not options.only or each[0] in options.only]
    if options.device == "cpu":
        rows = on_cpu(names, options.size, options.repeats)
    else:
        rows = on_device(names, options.size, options.repeats, options.device, options.compile)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(" | ".join(f"{column:>14}" for column in columns))
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        print(" | ".join(f"{cell:14.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
