"""The client side of `flower_app.py`: models, data made from keys, and a ClientApp that Ray's processes can import."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedsample.random import key

CLASSES, BATCH, RATE = 10, 32, 0.05
IMAGES, PIXELS = 500, (1, 28, 28)
Rows = tuple[Tensor, Tensor]


def perceptron() -> nn.Module:
    """64 -> 32 -> 10: 2,410 parameters."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def cnn() -> nn.Module:
    """Two 5 x 5 convolutions, a dense layer of 512: 1,663,370 parameters, images (B, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, CLASSES),
    )  # fmt: skip


def started(model: nn.Module) -> nn.Module:
    """The model with initial parameters from keys."""
    with torch.no_grad():
        for place, param in enumerate(model.parameters()):
            scale = param[0].numel() ** -0.5 if param.dim() > 1 else 0.01
            drawn = key(seed=0, purpose="start").fold(place).normal(param.numel(), param.dtype)
            param.copy_(scale * drawn.view_as(param))
    return model


@cache
def rows(client: int, n: int, shape: tuple[int, ...]) -> Rows:
    """A client's n inputs (n, *shape) around one centre per class, and their labels (n,)."""
    size = int(np.prod(shape))
    centres = key(seed=0, purpose="centres").normal(CLASSES * size, torch.float32).view(CLASSES, size)
    labels = key(seed=0, client=client, purpose="labels").integers(CLASSES, n)
    noise = key(seed=0, client=client, purpose="inputs").normal(n * size, torch.float32).view(n, size)
    return (0.3 * centres[labels] + noise).view(n, *shape), labels


@cache
def placed(client: int, n: int, shape: tuple[int, ...], device: str) -> Rows:
    """The same inputs and labels on a device."""
    inputs, labels = rows(client, n, shape)
    return inputs.to(device), labels.to(device)


def train(model: nn.Module, data: Rows, client: int, round: int) -> float:
    """Train one epoch of stochastic gradient descent in a keyed order; return the last loss."""
    inputs, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    order = key(seed=0, client=client, round=round, purpose="order").permutation(len(labels)).to(labels.device)
    loss = torch.zeros((), device=labels.device)
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    return float(loss.detach())


client_app = ClientApp()


def job(context: Context) -> tuple[nn.Module, Rows, int]:
    """A client's model, data and number."""
    client = int(context.node_config["partition-id"])
    if context.run_config.get("model") == "cnn":
        device = str(context.run_config.get("device", "cpu"))
        return cnn().to(device), placed(client, IMAGES, PIXELS, device), client
    return perceptron(), rows(client, 32, (64,)), client


@client_app.train()
def local_epoch(message: Message, context: Context) -> Message:
    """Train from the server's parameters, or return them unchanged where the server says `idle`."""
    if message.content["config"].get("idle"):
        content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)
    model, data, client = job(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(model, data, client, int(message.content["config"]["server-round"]))
    metrics = MetricRecord({"num-examples": len(data[1]), "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@client_app.evaluate()
def local_accuracy(message: Message, context: Context) -> Message:
    """Accuracy of the server's parameters on this client, or nothing where the server says `idle`."""
    if message.content["config"].get("idle"):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
    model, (inputs, labels), _ = job(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    with torch.no_grad():
        right = float((model(inputs).argmax(-1) == labels).double().mean())
    metrics = MetricRecord({"num-examples": len(labels), "accuracy": right})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
