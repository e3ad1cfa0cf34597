"""Keyed randomness: every draw is named by seed, round, client, chain and purpose."""

from fedsample.random.keys import SERVER, Key, key

__all__ = ["SERVER", "Key", "key"]
