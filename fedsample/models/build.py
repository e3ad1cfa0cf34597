"""Build the `nn.Module` of a configuration; it is a template whose parameters come from flat vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedsample.errors import ConfigError
from fedsample.models.table import likelihood_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedsample.config import ModelConfig
    from fedsample.data import FederatedData


def build(config: ModelConfig, data: FederatedData) -> nn.Module:
    """Build the network of a model for the shapes of a dataset.

    The module holds zeros, on the CPU, in float32: it serves `torch.func.functional_call`, which puts a flat vector's
    slices in their place, in any dtype and on any device. Nothing is drawn. It maps (B, *x.shape[1:]) to (B, K); K is
    the number of classes for a categorical likelihood and 1 otherwise. It has no buffers and treats rows one by one.

    Args:
        config: the section [model] of an experiment.
        data: gives the shape of a row and the number of classes.

    Raises:
        ConfigError: if there is no such model, or it does not fit the data.
    """
    outputs = data.classes if likelihood_of(config.name, data) == "categorical" else 1
    import torch

    with torch.device("meta"):  # layers draw initial values from the global generator, except on "meta"
        module = _network(config, tuple(data.x.shape[1:]), outputs or 1)
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def parameter_layout(module: nn.Module) -> list[tuple[str, tuple[int, ...], int]]:
    """Layout of the flat vector: (name, shape, offset), in `named_parameters` order, row-major."""
    layout, offset = [], 0
    for name, parameter in module.named_parameters():
        layout.append((name, tuple(parameter.shape), offset))
        offset += parameter.numel()
    return layout


def starting_law(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (both (d,), float64) of a normal law to start an optimiser from.

    Zero is a saddle of every network with a hidden layer: its units are equal there and stay equal. Weights get the
    deviation sqrt(1 / fan_in), so that signals neither grow nor fade with depth (LeCun, Bottou, Orr & Mueller 1998,
    "Efficient BackProp", equation 16); biases and a normalisation's shifts are 0, its scales 1.
    """
    import torch

    means, scales = [], []
    for name, parameter in module.named_parameters():
        weight = parameter.ndim >= 2
        fan_in = math.prod(parameter.shape[1:]) if weight else 1
        kind = name.rsplit(".", 1)[-1]
        means.append(torch.full((parameter.numel(),), 1.0 if kind == "gamma" else 0.0, dtype=torch.float64))
        scales.append(torch.full((parameter.numel(),), fan_in**-0.5 if weight else 0.0, dtype=torch.float64))
    return torch.cat(means), torch.cat(scales)


def _network(config: ModelConfig, shape: tuple[int, ...], outputs: int) -> nn.Module:
    from fedsample.models.dense import Linear, Mlp
    from fedsample.models.lenet import LeNet5
    from fedsample.models.resnet import ResNet20

    if config.name in ("linear", "logistic", "softmax"):
        return Linear(shape, outputs, config.intercept)
    if config.name == "mlp":
        if any(width < 1 for width in config.hidden):
            raise ConfigError(f"model.hidden = {list(config.hidden)}, expected widths of at least 1")
        return Mlp(shape, config.hidden, outputs, config.intercept)
    network = {"lenet5": LeNet5, "resnet20": ResNet20}[config.name]
    return network(shape, outputs, config.intercept)
