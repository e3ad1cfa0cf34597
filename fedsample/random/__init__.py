"""Keyed random numbers: seed, round, client, chain and purpose determine every draw."""

from fedsample.random.keys import SERVER, Key, key

__all__ = ["SERVER", "Key", "key"]
