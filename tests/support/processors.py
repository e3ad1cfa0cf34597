"""What this processor can run, by the levels of x86-64 (the psABI's micro-architecture levels)."""

from __future__ import annotations

from pathlib import Path

NEEDS = {  # flags of /proc/cpuinfo; abm is lzcnt
    "x86-64-v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3".split(),
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe".split(),
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl".split(),
}


def flags() -> set[str]:
    """The processor's features; empty where nothing says them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.partition(":")[2].split()}


def runs_code_for(level: str) -> bool:
    """Whether the processor has all of a level, which includes the levels below."""
    levels = list(NEEDS)
    return all(flags().issuperset(NEEDS[each]) for each in levels[: levels.index(level) + 1])
