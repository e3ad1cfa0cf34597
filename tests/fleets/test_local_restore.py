"""The local fleet: states that resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from local_fleets import ROUNDS, UPLINKS, Rig, quadratic, softmax

from fedsample.fleets.local import Engine
from fedsample.strategies import State


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("participation", [1.0, 2])
@pytest.mark.parametrize(
    ("first", "second"), [("batched", "batched"), ("by-client", "by-client"), ("batched", "by-client")]
)
def test_a_restored_fleet_continues_to_the_bit(
    uplink: str, participation: float, first: Engine, second: Engine
) -> None:
    """From tensors alone, in a new process's place: also in the other engine, where arithmetic is elementwise."""
    options: dict[str, Any] = {"participation": participation, "loss": 0.2, "dropout": 0.1, "kernel": "baoab"}
    whole = Rig(quadratic(), uplink, engine=first, **options)
    want = whole.run(ROUNDS)

    before = Rig(quadratic(), uplink, engine=first, **options)
    before.run(9)
    saved = {name: tensor.clone() for name, tensor in before.fleet.state().items()}
    held = before.fleet.state()
    chain = before.state.tensors()
    before.run(3)
    for name, tensor in saved.items():
        assert torch.equal(held[name], tensor), f"{name} is not a snapshot"

    after = Rig(quadratic(), uplink, engine=second, **options)
    after.fleet.restore(held)
    after.state = State.of_tensors(chain, torch.device("cpu"))
    got = after.run(ROUNDS - 9)
    for name, tensor in saved.items():
        assert torch.equal(held[name], tensor), f"continuing from {name} changes the checkpoint"
    for name, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    final = after.fleet.state()
    assert all(torch.equal(tensor, final[name]) for name, tensor in whole.fleet.state().items())


@pytest.mark.parametrize("uplink", ["marina", "diana"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_restored_regression_continues_to_the_bit(uplink: str, batch_size: int | None) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "loss": 0.2}
    want = Rig(softmax(), uplink, **options).run(ROUNDS)
    before, after = Rig(softmax(), uplink, **options), Rig(softmax(), uplink, **options)
    before.run(11)
    after.fleet.restore(before.fleet.state())
    after.state = State.of_tensors(before.state.tensors(), torch.device("cpu"))
    assert torch.equal(after.run(ROUNDS - 11).params, want.params)


def test_a_fleet_that_forgets_its_memories_does_not_continue_alike() -> None:
    want = Rig(quadratic(), "diana").run(ROUNDS)
    before, after = Rig(quadratic(), "diana"), Rig(quadratic(), "diana")
    before.run(9)
    after.state = State.of_tensors(before.state.tensors(), torch.device("cpu"))
    assert not torch.allclose(after.run(ROUNDS - 9).params, want.params, rtol=1e-3)
