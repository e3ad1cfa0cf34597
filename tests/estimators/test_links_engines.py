"""Links in the loop: every preset on both engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from chain_rounding import alone, draws_bound
from link_rigs import ABSENCES, CHAINS, Rig
from rounding import assert_within
from running_error import RunningError
from torch import Tensor

from fedsample.config.presets import PRESETS
from fedsample.strategies import State
from fedsample.targets import GeneralizedLinear


def of_preset(name: str, data: Mapping[str, Any], **fleet: Any) -> dict[str, Any]:
    refresh = {"uplink": {"refresh": 7}} if name == "qlsd-plus-plus" else {}
    return {"preset": name, "data": data, "chains": CHAINS, "fleet": fleet, **refresh}


@pytest.mark.parametrize("absence", [{}, ABSENCES[3]], ids=["everyone", "faults"])
@pytest.mark.parametrize("preset", PRESETS)
def test_both_engines_draw_the_same_on_quadratics(
    preset: str, absence: dict[str, Any], quadratics: dict[str, Any]
) -> None:
    runs = [Rig(of_preset(preset, quadratics, engine=each, **absence)) for each in ("batched", "by-client")]
    one, other = (rig.draws(25) for rig in runs)
    assert torch.equal(one, other)
    a, b = (rig.fleet.state() for rig in runs)
    assert all(torch.equal(a[name], b[name]) for name in a if name in b)


WINE: dict[str, Any] = {"name": "wine", "clients": 4}


def on_wine(preset: str, engine: str, like: Rig | None = None) -> Rig:
    return Rig(of_preset(preset, WINE, engine=engine), step_size="auto", like=like)


@pytest.mark.parametrize(
    "preset", ["underdamped-diana", "langevin-marina", "qlsd-star", "qlsd-plus-plus", "b-elf", "dsgld"]
)
def test_both_engines_draw_the_same_bits_on_data_where_each_client_is_computed_alone(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the products inside a client's gradient tells the engines apart: decisions by value included."""
    alone(monkeypatch)
    one = on_wine(preset, "batched")
    other = on_wine(preset, "by-client", like=one)
    assert torch.equal(one.draws(20), other.draws(20))
    a, b = one.fleet.state(), other.fleet.state()
    assert all(torch.equal(a[name], b[name]) for name in a if name in b)


def posterior_scale(rig: Rig) -> Tensor:
    """(d,) standard deviations of the Laplace approximation at the mode."""
    mode = rig.prepared.geometry.metric.mean
    curvature = rig.problem.clients.hessian(mode.unsqueeze(0))[:, 0].sum(0)
    precision = curvature + rig.problem.prior.precision * torch.eye(len(mode)).double()
    return torch.linalg.inv(precision).diagonal().sqrt()


@pytest.mark.rounding
@pytest.mark.parametrize("preset", ["underdamped-diana", "langevin-marina", "dsgld"])
def test_both_engines_draw_the_same_on_data_up_to_the_rounding_of_products(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Presets without decisions by value: each gradient's rounding, as far as the chain itself carries it on."""
    prepared = on_wine(preset, "by-client")
    one, other = (on_wine(preset, engine, prepared).draws(20) for engine in ("batched", "by-client"))
    bound = draws_bound(monkeypatch, lambda: on_wine(preset, "by-client", prepared).draws(20))
    assert_within(one, other, bound)
    scale = posterior_scale(prepared)
    assert float((bound / scale).max()) < 1e-7  # of a standard deviation of the posterior, in every coordinate

    def dropped(self: GeneralizedLinear, residual: Any, targets: Any) -> Tensor:
        return whole(self, residual, targets) * (1 + 1e-7)

    whole = GeneralizedLinear._residual
    monkeypatch.setattr(GeneralizedLinear, "_residual", dropped)  # a mutant that is wrong in the eighth digit
    with pytest.raises(AssertionError, match="differ by more than arithmetic does"):
        assert_within(on_wine(preset, "batched", prepared).draws(20), other, bound)


@pytest.mark.rounding
def test_two_preparations_find_one_mode() -> None:
    """An optimiser stops by its tolerance: a last bit may cost it an iteration, so modes agree to that and no better.

    U is mu-convex by its prior N(0, 1 / mu): mu |m - m'| <= |grad U(m) - grad U(m')| (Nesterov 2004, theorem 2.1.10).
    """
    rigs = [on_wine("langevin-diana", engine) for engine in ("batched", "by-client")]
    modes = [rig.prepared.geometry.metric.mean for rig in rigs]
    clients, prior = rigs[1].problem.clients, rigs[1].problem.prior
    with RunningError() as analysis:
        gradients = [clients.gradient(m.unsqueeze(0)).sum(0)[0] + prior.gradient(m) for m in modes]
        own = [analysis.error(each).norm() for each in gradients]
    bound = sum(float(g.norm() + e) for g, e in zip(gradients, own, strict=True)) / prior.precision
    assert float((modes[0] - modes[1]).norm()) <= bound
    assert bound < 1e-4 * float(posterior_scale(rigs[1]).min())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_restored_chain_goes_on_as_before(preset: str, quadratics: dict[str, Any]) -> None:
    """References, what clients see, memories and who knows what are part of the state."""
    absence = {} if preset == "dsgld" else {"participation": 0.6, "loss": 0.1}
    first = Rig(of_preset(preset, quadratics, **absence))
    first.draws(19)
    state = {name: tensor.clone() for name, tensor in first.state.tensors().items()}
    fleet = {name: tensor.clone() for name, tensor in first.fleet.state().items()}
    again = Rig(of_preset(preset, quadratics, **absence))
    again.fleet.restore(fleet)
    again.state = State.of_tensors(state, torch.device("cpu"))
    for _ in range(15):
        traffic = [rig.step()[2].traffic for rig in (first, again)]
        assert traffic[0] == traffic[1]
    for name, tensor in first.state.tensors().items():
        assert torch.equal(tensor, again.state.tensors()[name]), name
