"""Transition kernels on tensors: no clients, no input or output, all randomness passed in."""

from fedsample.kernels.baoab import baoab_step
from fedsample.kernels.langevin import langevin_step

__all__ = ["baoab_step", "langevin_step"]
