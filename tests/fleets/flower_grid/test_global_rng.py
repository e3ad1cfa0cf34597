"""What a ServerApp and its ClientApps draw from global generators, though they share a process."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsample.fleets.flower_grid import run_flower

Draws = list[tuple[float, float, float]]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002  what is tested


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  what is tested
    torch.manual_seed(number)


def drawn(
    client_seed: int | None, server_seed: int = 1, *, workers: int = 1, hang: bool = False
) -> tuple[Draws, Draws]:
    """What the server draws between three rounds, and what its four clients draw, in order."""
    server_app, client_app, gate = ServerApp(), ClientApp(), threading.Event()
    of_server: Draws = []
    of_clients: Draws = []

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        if client_seed is not None:
            seed(client_seed)
        if hang and context.node_config["partition-id"] == 3:
            gate.wait(60)
        of_clients.append(draw())
        return Message(RecordDict({"none": ConfigRecord()}), reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        seed(server_seed)
        for _ in range(3):
            of_server.append(draw())
            messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
            list(grid.send_and_receive(messages, timeout=0.5 if hang else 20))
        of_server.append(draw())
        gate.set()

    run_flower(server_app, client_app, 4, workers=workers)
    return of_server, of_clients


def alone(number: int) -> Draws:
    seed(number)
    return [draw() for _ in range(4)]


@pytest.mark.parametrize("options", [{}, {"workers": 3}, {"hang": True}])
def test_clients_that_seed_do_not_touch_what_the_server_draws(options: dict[str, Any]) -> None:
    assert drawn(7, **options)[0] == alone(1)


def test_clients_draw_from_a_stream_of_their_own_the_same_in_every_run() -> None:
    server, clients = drawn(None)
    assert len({*server, *clients}) == 4 + 12
    assert drawn(None) == (server, clients)
    assert not {*drawn(None, 2)[1]} & {*clients}


def test_what_a_client_seeds_is_what_the_next_one_draws_from() -> None:
    assert drawn(7)[1] == alone(7)[:1] * 12


def test_another_generator_in_numpys_place_is_left_there() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        drawn(None)
        assert np.random.get_state(legacy=False)["bit_generator"] == "PCG64"  # noqa: NPY002  what is tested
    finally:
        np.random.set_bit_generator(before)
