"""Models: shapes, layouts, no draw and no state, and derivatives under torch.func."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_within, central_difference
from running_error import LIKELY, RunningError, assert_same_in_norm, response
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from fedsample.data import FederatedData
from fedsample.errors import ConfigError
from fedsample.models import build, likelihood_of, models, parameter_layout, starting_law, task_of
from fedsample.models.dense import Mlp
from fedsample.models.resnet import FilterResponseNorm, _Block, _Convolution


def config(name: str, **given: Any) -> Any:
    return SimpleNamespace(**{"name": name, "hidden": [5], "intercept": True, **given})


def toy(shape: tuple[int, ...], classes: int | None, rows: int = 6) -> FederatedData:
    rng = np.random.default_rng(0)
    y = rng.normal(size=rows) if classes is None else np.arange(rows) % classes
    x = rng.uniform(size=(rows, *shape))
    return FederatedData("toy", x, y, np.array([0, rows]), x[:0], y[:0], classes)


CASES = [
    ("linear", (4,), None, 5),
    ("linear", (2, 3), None, 7),
    ("logistic", (4,), 2, 5),
    ("softmax", (64,), 10, 650),
    ("mlp", (4,), 3, 5 * 5 + 6 * 3),
    ("mlp", (2, 2), None, 5 * 5 + 6),
    ("lenet5", (28, 28), 10, 61706),
    ("lenet5", (1, 28, 28), 10, 61706),
    ("lenet5", (32, 32, 3), 10, 62006),
    ("resnet20", (32, 32, 3), 10, 274042),
]


def flat(module: nn.Module, seed: int = 0) -> Tensor:
    """A float64 parameter vector from the starting law, without the global generator."""
    mean, scale = starting_law(module)
    return mean + scale * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pour(module: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    return {
        name: theta[offset : offset + torch.Size(shape).numel()].view(shape)
        for name, shape, offset in parameter_layout(module)
    }


@pytest.mark.parametrize(("name", "shape", "classes", "size"), CASES)
def test_sizes_shapes_and_layout(name: str, shape: tuple[int, ...], classes: int | None, size: int) -> None:
    data = toy(shape, classes)
    before = torch.random.get_rng_state()
    module = build(config(name), data)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all((parameter == 0).all() for parameter in module.parameters())
    assert not list(module.buffers())
    layout = parameter_layout(module)
    end = 0
    for (key, parameter), (listed, dims, offset) in zip(module.named_parameters(), layout, strict=True):
        assert (key, tuple(parameter.shape), end) == (listed, dims, offset)
        end += parameter.numel()
    assert end == size
    outputs = classes if likelihood_of(name, data) == "categorical" else 1
    x = torch.from_numpy(data.x)
    assert functional_call(module, pour(module, flat(module)), (x,)).shape == (6, outputs)


@pytest.mark.rounding
@pytest.mark.parametrize(("name", "shape", "classes", "size"), CASES)
def test_rows_do_not_see_each_other(name: str, shape: tuple[int, ...], classes: int | None, size: int) -> None:
    data = toy(shape, classes, rows=3)
    module = build(config(name), data)
    parameters = pour(module, flat(module))
    x = torch.from_numpy(data.x)
    # other batch sizes sum in another order
    assert_same_in_norm(
        lambda: functional_call(module, parameters, (x,)),
        lambda: torch.cat([functional_call(module, parameters, (row[None],)) for row in x]),
    )


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("softmax", (4,), 3), ("mlp", (4,), 3), ("lenet5", (28, 28), 3), ("resnet20", (32, 32, 3), 3)],
)
def test_vmapped_gradients_equal_a_loop(name: str, shape: tuple[int, ...], classes: int) -> None:
    data = toy(shape, classes, rows=1 if name == "resnet20" else 2)
    module = build(config(name), data)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)

    def potential(theta: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(module, pour(module, theta), (x,)), y, reduction="sum")

    thetas = torch.stack([flat(module, seed) for seed in (0, 1)])

    def by_backward() -> Tensor:
        found = []
        for theta in thetas:
            leaf = theta.clone().requires_grad_()
            potential(leaf).backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
        return torch.stack(found)

    batched, _ = assert_same_in_norm(
        lambda: vmap(grad(potential))(thetas), by_backward, responses=1 if thetas.shape[1] > 1000 else 4
    )
    for theta, got in zip(thetas, batched, strict=True):
        # A directional derivative by central differences: autograd agreeing with itself is not enough.
        direction = torch.sign(got)
        evaluation = LIKELY * float(response(lambda theta=theta: potential(theta).unsqueeze(0), responses=1))
        slope, error = central_difference(potential, theta, direction, 1e-6 / len(theta), evaluation)
        assert_within(slope, got @ direction, error, sees=1e-2)


def test_second_derivatives() -> None:
    data = toy((3,), None)
    module = build(config("mlp", hidden=[4, 3]), data)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)

    def potential(theta: Tensor) -> Tensor:
        return 0.5 * (functional_call(module, pour(module, theta), (x,))[:, 0] - y).square().sum()

    theta = flat(module)
    with RunningError() as analysis:
        slope = grad(potential)(theta)
        curvature = jacrev(grad(potential))(theta)
        analysis.close(curvature, curvature.T)
    evaluation = float(analysis.error(slope).max())
    for j, direction in enumerate(torch.eye(len(theta), dtype=torch.float64)):
        difference, error = central_difference(grad(potential), theta, direction, 1e-5, evaluation)
        assert_within(difference, curvature[j], error + analysis.error(curvature[j]), sees=1e-3)


def test_linear_is_the_closed_form() -> None:
    data = toy((2, 3), 4)
    module = build(config("softmax"), data)
    theta = flat(module)
    weight, bias = theta[:24].view(4, 6), theta[24:] + 1
    with RunningError() as analysis:
        got = functional_call(module, {"weight": weight, "bias": bias}, (torch.from_numpy(data.x),))
        analysis.close(got, torch.from_numpy(data.x).reshape(6, 6) @ weight.T + bias)
    bare = build(config("softmax", intercept=False), data)
    assert parameter_layout(bare) == [("weight", (4, 6), 0)]


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet20"])
def test_networks_without_intercepts(name: str) -> None:
    data = toy((32, 32, 3), 2, rows=2)
    module = build(config(name, intercept=False), data)
    assert not any(key.endswith("bias") for key, _, _ in parameter_layout(module))


def test_mlp_activations() -> None:
    module = Mlp((2,), [3], 1, intercept=False)
    x = torch.tensor([[0.3, -2.0]])
    first, second = module.layers[0].weight, module.layers[1].weight
    with RunningError() as analysis:
        analysis.close(module(x), torch.tanh(x @ first.T) @ second.T)


@pytest.mark.parametrize(("name", "grey"), [("lenet5", True), ("resnet20", False)])
def test_layouts_of_images_agree(name: str, grey: bool) -> None:
    last = torch.from_numpy(np.random.default_rng(0).uniform(size=(2, 32, 32, 1 if grey else 3)))

    def outputs(images: Tensor) -> Tensor:
        module = build(config(name), toy(tuple(images.shape[1:]), 2, rows=2))
        result: Tensor = functional_call(module, pour(module, flat(module)), (images,))
        return result

    layouts = [last, last.movedim(-1, -3), *([last[..., 0]] if grey else [])]
    assert_same_in_norm(*(lambda images=images: outputs(images) for images in layouts))


def test_filter_response_norm_is_its_equation() -> None:
    norm = FilterResponseNorm(2)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.tau += torch.tensor([-0.5, 9.0])
        norm.gamma += torch.tensor([1.0, 0.0])
        norm.beta += 0.25
    with RunningError() as analysis:
        got = norm(x)
        for image in range(3):
            channel = x[image, 0]
            want = 2 * channel / torch.sqrt((channel**2).mean() + 1e-6) + 0.25
            analysis.close(got[image, 0], want.clamp(min=-0.5))
    assert (got[:, 1] == 9).all()  # a threshold above every value
    assert torch.isfinite(norm(torch.zeros(1, 2, 4, 4))).all()


def test_residual_block_adds_its_shortcut() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for outputs, stride in ((3, 1), (6, 2)):
        block = _Block(3, outputs, stride, intercept=True)
        nn.init.zeros_(block.second.norm.gamma)  # switches the residual branch off
        with RunningError() as analysis:
            analysis.close(block(x), nn.functional.silu(block.shortcut(x)))
        assert block(x).shape == (2, outputs, 8 // stride, 8 // stride)
        nn.init.ones_(block.second.norm.gamma)
        with RunningError() as analysis:
            inner = block.second(nn.functional.silu(block.first(x)))
            analysis.close(block(x), nn.functional.silu(block.shortcut(x) + inner))


def test_halving_pads_below_and_to_the_right() -> None:
    layer = _Convolution(1, 1, stride=2, intercept=False)
    with torch.no_grad():
        layer.conv.weight.zero_()[0, 0, 0, 0] = 1  # picks the upper left pixel of each window
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    picked = x[..., ::2, ::2]
    with RunningError() as analysis:
        analysis.close(layer(x), picked / torch.sqrt(picked.square().mean() + 1e-6))


def test_signals_keep_their_size_at_the_starting_law() -> None:
    data = toy((32, 32, 3), 10)
    for name in ("mlp", "lenet5", "resnet20"):
        module = build(config(name, hidden=[50, 50, 50]), data)
        output = functional_call(module, pour(module, flat(module)), (torch.from_numpy(data.x),))
        assert 0.01 < float(output.std()) < 10, name


def test_the_table_fits_the_classes() -> None:
    assert [fact.name for fact in models()] == [
        "linear",
        "logistic",
        "softmax",
        "mlp",
        "lenet5",
        "resnet20",
        "quadratic",
    ]
    assert [task_of(name) for name in ("linear", "logistic", "mlp")] == ["regression", "classification", None]


@pytest.mark.parametrize(
    ("name", "classes", "want"),
    [
        ("linear", None, "gaussian"),
        ("mlp", None, "gaussian"),
        ("mlp", 2, "categorical"),
        ("logistic", 2, "bernoulli"),
        ("softmax", 2, "categorical"),
    ],
)
def test_likelihoods(name: str, classes: int | None, want: str) -> None:
    assert likelihood_of(name, toy((3,), classes)) == want


@pytest.mark.parametrize(
    ("given", "shape", "classes", "message"),
    [
        ({"name": "softmaxx"}, (3,), 2, "Did you mean 'softmax'"),
        ({"name": "softmax"}, (3,), None, "choose one of linear, mlp"),
        ({"name": "linear"}, (3,), 2, "choose one of logistic, softmax"),
        ({"name": "logistic"}, (3,), 3, 'choose "softmax"'),
        ({"name": "quadratic"}, (3,), None, "no likelihood"),
        ({"name": "mlp", "hidden": [3, 0]}, (3,), 2, "widths of at least 1"),
        ({"name": "lenet5"}, (8, 8), 2, "28x28 or 32x32"),
        ({"name": "lenet5"}, (64,), 2, "28x28 or 32x32"),
        ({"name": "resnet20"}, (32, 32), 2, "32x32 pixels with 3 channels"),
    ],
)
def test_models_that_do_not_fit(
    given: dict[str, Any], shape: tuple[int, ...], classes: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config(**given), toy(shape, classes))
