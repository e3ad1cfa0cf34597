"""Metrics: S against its definition, and targets in z against autograd of U(m + S z)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from rounding import ELEMENTARY, assert_within, gamma, solved
from running_error import RunningError
from torch import Tensor
from torch.func import grad, jacrev
from torch.utils._python_dispatch import _disable_current_modes

from fedsample.errors import DivergenceError
from fedsample.models.dense import Linear
from fedsample.random import Key, key
from fedsample.targets import GaussianPrior, GeneralizedLinear, Metric, MetricClients, MetricPrior, ModuleClients
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, restore

F64 = torch.float64
NAMES = ("identity", "diagonal", "hessian", "kronecker")
SIZES, FEATURES, CLASSES, CHAINS = (5, 0, 1, 9), 3, 3, 2
D = CLASSES * (FEATURES + 1)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(autouse=True)
def _analysis() -> Iterator[None]:
    """Every test of this file runs under a running error analysis, which says how far `close` lets two ways part."""
    global ANALYSIS
    with RunningError() as ANALYSIS:
        yield


def close(got: Tensor, want: Tensor, sees: float | None = None) -> None:
    ANALYSIS.close(got, want, sees=sees)


def decomposed(make: Callable[[], Metric], precision: Tensor) -> Metric:
    """A metric from the eigenvectors of what it stands for, whose errors are these, and not those of the way to it.

    S and its inverse are off by what the eigenvalues are, cond(P) gamma of their norm; vectors are orthogonal to gamma.
    """
    with _disable_current_modes():
        metric, many = make(), solved(precision, 2 * len(precision))
        exact = [(tensor, 0.0) for tensor in metric.tensors().values()]
        if isinstance(metric, Dense):
            parts = [each for each in (metric.root, metric.inverse) if each is not None]
            exact = [
                (each, gamma(many, each.dtype) * float(torch.linalg.matrix_norm(each.double(), 2))) for each in parts
            ]
        if isinstance(metric, Kronecker):
            exact = [(each, gamma(10 * len(each), each.dtype)) for part in metric.parts for each in part[1:3]] + [
                (part[3], gamma(many, part[3].dtype) * part[3].abs().double()) for part in metric.parts
            ]
        if isinstance(metric, Diagonal):
            exact = [(metric.scales, gamma(ELEMENTARY, metric.scales.dtype) * metric.scales.abs().double())]
    for tensor, error in exact:
        ANALYSIS.given(tensor, error)
    return metric


def definite(d: int, seed: int = 1) -> Tensor:
    root = normal(d, d, seed=seed)
    return root @ root.T + 0.1 * torch.eye(d, dtype=F64)


def factors_of(o: int, i: int, seed: int) -> tuple[Tensor, Tensor]:
    """B and A of a few matrices u (o, i), as a client makes them."""
    u = normal(7, o, i, seed=seed)
    return torch.einsum("rai,rbi->ab", u, u), torch.einsum("rai,raj->ij", u, u)


def metric_of(name: str, dtype: torch.dtype = F64) -> tuple[Metric, Tensor]:
    """A metric of D parameters, and the precision P (D, D) that it stands for."""
    mean = normal(D, seed=9).to(dtype)
    if name == "identity":
        return Identity(mean), torch.eye(D, dtype=F64)
    if name == "diagonal":
        precision = normal(D, seed=2).square() + 0.1
        return decomposed(lambda: Diagonal.of_precision(mean, precision), torch.diag(precision)), torch.diag(precision)
    if name == "hessian":
        precision = definite(D, seed=2)
        return decomposed(lambda: Dense.of_precision(mean, precision), precision), precision
    order = torch.tensor([4, 0, 7, 11, 2, 9, 1, 3, 5, 6, 8, 10])  # blocks need not lie in one piece
    blocks, factors = [order[:8].view(4, 2), order[8:].view(4, 1)], [factors_of(4, 2, 3), factors_of(4, 1, 4)]
    precision = 0.3 * torch.eye(D, dtype=F64)
    for block, (outer, inner) in zip(blocks, factors, strict=True):
        flat = block.flatten()
        precision[flat[:, None], flat] += torch.kron(outer, inner) / inner.trace()
    return decomposed(lambda: Kronecker.of_factors(mean, blocks, factors, 0.3), precision), precision


def matrix_of(metric: Metric) -> Tensor:
    """S (D, D)."""
    return metric.scale(torch.eye(len(metric.mean), dtype=metric.mean.dtype)).T


def row_major(tensor: Tensor) -> Tensor:
    """A copy as a file or a message brings it."""
    return tensor.clone(memory_format=torch.contiguous_format)


# --- S itself --------------------------------------------------------------------------------------------------------


@pytest.mark.rounding
@pytest.mark.parametrize("name", NAMES)
def test_s_is_the_symmetric_root_of_the_inverse_precision(name: str) -> None:
    metric, precision = metric_of(name)
    root = matrix_of(metric)
    close(root, root.T)
    close(root @ root.T, torch.linalg.inv(precision))
    assert metric.name == name


@pytest.mark.parametrize("leading", [(), (1,), (2,), (3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, leading: tuple[int, ...]) -> None:
    metric, _ = metric_of(name)
    z, root = normal(*leading, D), matrix_of(metric)
    close(metric.push(z), metric.mean + z @ root.T)
    close(metric.scale(z), z @ root.T)
    close(metric.pull(z), z @ root)
    close(metric.unscale(metric.scale(z)), z)
    close(metric.invert(metric.push(z)), z)
    close(metric.push(metric.invert(z)), z)
    assert metric.push(z).shape == z.shape


@pytest.mark.parametrize("name", NAMES)
def test_another_centre_leaves_s_and_the_first_metric_alone(name: str) -> None:
    metric, _ = metric_of(name)
    before, z = metric.mean.clone(), normal(2, D)
    moved = metric.about(before + 1)
    close(moved.push(z), metric.push(z) + 1)
    assert torch.equal(moved.scale(z), metric.scale(z))
    assert torch.equal(metric.mean, before)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_all_that_a_metric_needs(name: str, dtype: torch.dtype) -> None:
    metric, _ = metric_of(name, dtype)
    twin = restore(name, metric.mean, {key: row_major(tensor) for key, tensor in metric.tensors().items()})
    assert type(twin) is type(metric)
    z = normal(3, D).to(dtype)
    for act, same in ((metric.push, twin.push), (metric.pull, twin.pull), (metric.invert, twin.invert)):
        assert torch.equal(act(z), same(z))
        assert act(z).dtype == dtype
    assert twin.tensors().keys() == metric.tensors().keys()
    assert all(torch.equal(twin.tensors()[key], tensor) for key, tensor in metric.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", NAMES)
def test_clients_act_to_the_bit_as_the_server_does(name: str, dtype: torch.dtype) -> None:
    metric, _ = metric_of(name, dtype)
    received = {key: row_major(tensor) for key, tensor in metric.wire().items()}
    if isinstance(metric, Kronecker):  # clients know the blocks from their model
        received |= {f"positions{b}": part[0] for b, part in enumerate(metric.parts)}
    if isinstance(metric, Dense):  # one triangle travels
        received["root"] = received["root"].triu() + received["root"].triu(1).T
    client, z = restore(name, metric.mean, received), normal(3, D).to(dtype)
    assert torch.equal(client.push(z), metric.push(z))
    assert torch.equal(client.pull(z), metric.pull(z))


@pytest.mark.parametrize(
    ("name", "entries"),
    [("identity", 0), ("diagonal", D), ("hessian", D * (D + 1) // 2), ("kronecker", 16 + 4 + 8 + 16 + 1 + 4)],
)
def test_bits_count_each_entry_of_what_travels_once(name: str, entries: int) -> None:
    metric, precision = metric_of(name)
    assert metric.bits(torch.float32) == 32 * entries
    assert metric.bits(F64) == 64 * entries
    if name == "hessian":
        assert entries == precision.triu().count_nonzero()


# --- what it is made from --------------------------------------------------------------------------------------------


def softmax(intercept: bool = True) -> GeneralizedLinear:
    x, y = normal(sum(SIZES), FEATURES), torch.arange(sum(SIZES)) * 7 % 5 % CLASSES
    offsets = torch.tensor([0, *torch.tensor(SIZES).cumsum(0)])
    return GeneralizedLinear(x, y, offsets, "categorical", CLASSES, intercept=intercept)


def metrics_at(point: Tensor, clients: GeneralizedLinear, precision: float) -> tuple[Kronecker, Dense]:
    summed = [(outer.sum(0), inner.sum(0)) for outer, inner in clients.factors(point)]
    hessian = clients.hessian(point.unsqueeze(0))[:, 0].sum(0) + precision * torch.eye(clients.d, dtype=F64)
    kronecker = decomposed(lambda: Kronecker.of_factors(point, clients.blocks(), summed, precision), hessian)
    return kronecker, decomposed(lambda: Dense.of_precision(point, hessian), hessian)


@pytest.mark.parametrize("intercept", [True, False])
def test_kronecker_is_dense_where_the_hessian_is_a_kronecker_product(intercept: bool) -> None:
    clients = softmax(intercept)
    kronecker, dense = metrics_at(torch.zeros(clients.d, dtype=F64), clients, 0.2)  # all rows share their Lambda at 0
    close(matrix_of(kronecker), matrix_of(dense))
    kronecker, dense = metrics_at(normal(clients.d), clients, 0.2)
    assert float((matrix_of(kronecker) - matrix_of(dense)).abs().max()) > 0.01


def test_kronecker_is_dense_for_linear_regression() -> None:
    x, y, offsets = normal(9, FEATURES), normal(9, seed=2), torch.tensor([0, 4, 4, 9])
    clients = GeneralizedLinear(x, y, offsets, "gaussian", noise_scale=0.5)
    kronecker, dense = metrics_at(normal(clients.d), clients, 0.0)
    close(matrix_of(kronecker), matrix_of(dense))


def test_a_module_gives_kronecker_blocks_of_its_own() -> None:
    closed = softmax(intercept=False)
    clients = ModuleClients(
        Linear((FEATURES,), CLASSES, False), closed.design, closed.labels, closed.offsets, "categorical"
    )
    point = normal(clients.d)
    summed = [(outer.sum(0), inner.sum(0)) for outer, inner in clients.factors(point)]
    like = clients.hessian(point.unsqueeze(0))[:, 0].sum(0) + 0.2 * torch.eye(clients.d, dtype=F64)
    metric = decomposed(lambda: Kronecker.of_factors(point, clients.blocks(), summed, 0.2), like)
    close(matrix_of(metric), matrix_of(metrics_at(point, closed, 0.2)[0]))


def test_the_dense_metric_whitens_its_hessian() -> None:
    clients, point = softmax(), normal(D)
    metric = metrics_at(point, clients, 0.2)[1]
    prior = 0.2 * matrix_of(metric) @ matrix_of(metric)
    at_mode = MetricClients(clients, metric).hessian(torch.zeros(1, D, dtype=F64))[:, 0].sum(0)
    close(at_mode + prior, torch.eye(D, dtype=F64))


# --- flat directions -------------------------------------------------------------------------------------------------


def singular(name: str, dtype: torch.dtype, curvature: float, flat: float) -> Metric:
    """Half of the eigenvalues are `curvature`, half `flat`."""
    mean = torch.zeros(4, dtype=dtype)
    values = torch.tensor([curvature, curvature, flat, flat], dtype=F64)
    if name == "diagonal":
        return Diagonal.of_precision(mean, values.to(dtype))
    if name == "hessian":
        basis = torch.linalg.qr(normal(4, 4)).Q
        return Dense.of_precision(mean, ((basis * values) @ basis.T).to(dtype))
    outer = torch.diag(torch.tensor([curvature, flat], dtype=F64)) * 2
    inner = torch.eye(2, dtype=F64) * outer.trace() / 2
    block = torch.arange(4).view(2, 2)
    return Kronecker.of_factors(mean, [block], [(outer.to(dtype), inner.to(dtype))], 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("curvature", "flat"), [(4.0, 0.0), (0.0, 0.0), (4.0, -1e-9), (-1.0, -1.0), (1e-20, 0.0)])
@pytest.mark.parametrize("name", NAMES[1:])
def test_flat_directions_stay_finite(name: str, curvature: float, flat: float, dtype: torch.dtype) -> None:
    with _disable_current_modes():
        metric = singular(name, dtype, curvature, flat)
    root, z = matrix_of(metric), normal(3, 4).to(dtype)
    assert bool(torch.isfinite(root).all())
    assert bool(torch.isfinite(metric.invert(metric.push(z))).all())
    largest = float(torch.linalg.matrix_norm(root.double(), 2))
    own = gamma(6 * 4 * 4, dtype) * largest  # vectors are off by gamma, which a flat direction's scale magnifies
    assert float(torch.linalg.eigvalsh(root.double()).min()) > -own
    if curvature > 0 and dtype == F64:
        small = torch.linalg.eigvalsh(root)[:2]  # the directions that are curved keep their scale
        assert_within(small, torch.full((2,), curvature**-0.5, dtype=F64), own, sees=1e-2)
    if curvature <= 0:
        assert_within(root.double(), torch.eye(4, dtype=F64), own, sees=1e-4)  # no curvature: no scale


@pytest.mark.parametrize("name", ["hessian", "diagonal"])
def test_coordinates_of_unlike_scales_are_whitened_whatever_the_precision(name: str) -> None:
    """A float32 Hessian knows each entry to 1e-7 of itself: a column in other units takes no direction's scale away."""
    units = torch.tensor([1.0, 3e4, 0.1, 200.0], dtype=F64)
    correlated = torch.full((4, 4), 0.6 if name == "hessian" else 0.0, dtype=F64).fill_diagonal_(1.0)
    precision = correlated * torch.outer(units, units)
    mean = torch.zeros(4, dtype=F64)
    if name == "hessian":
        metric: Metric = Dense.of_precision(mean, precision.float())
    else:
        metric = Diagonal.of_precision(mean, precision.float().diagonal())
    root = matrix_of(metric)
    # each entry is off by u of float32, relative to its row's and column's units: in those the matrix is `correlated`
    own = 2 * gamma(1, torch.float32) * 4 * float(torch.linalg.cond(correlated))
    assert_within(root.T @ precision @ root, torch.eye(4, dtype=F64), own, sees=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    mean, values = torch.zeros(2, dtype=F64), torch.tensor([1.0, bad], dtype=F64)
    with pytest.raises(DivergenceError, match="not finite"):
        Diagonal.of_precision(mean, values)
    with pytest.raises(DivergenceError, match="not finite"):
        Dense.of_precision(mean, torch.diag(values))
    block, one = torch.arange(2).unsqueeze(1), torch.ones(1, 1, dtype=F64)
    with pytest.raises(DivergenceError, match="not finite"):
        Kronecker.of_factors(mean, [block], [(torch.diag(values), one)], 1.0)


# --- targets in z ----------------------------------------------------------------------------------------------------


def in_z(metric: Metric, clients: GeneralizedLinear, i: int) -> Callable[[Tensor], Tensor]:
    """U_i(m + S z) of one client, written with PyTorch's own loss."""
    a, b = int(clients.offsets[i]), int(clients.offsets[i + 1])
    x, y, root = clients.design[a:b], clients.labels[a:b], matrix_of(metric)

    def potential(z: Tensor) -> Tensor:
        theta = metric.mean + root @ z
        weight, bias = theta[: CLASSES * FEATURES].view(CLASSES, FEATURES), theta[CLASSES * FEATURES :]
        outputs = torch.nn.functional.linear(x[:, :FEATURES], weight, bias)
        return torch.nn.functional.cross_entropy(outputs, y, reduction="sum")

    return potential


def batch_keys(n: int) -> Key:
    return key(7, client=torch.arange(n).unsqueeze(-1), chain=torch.arange(CHAINS), purpose="batch")


@pytest.mark.rounding
@pytest.mark.parametrize("name", NAMES)
def test_clients_in_z_follow_the_chain_rule(name: str) -> None:
    base, metric = softmax(), metric_of(name)[0]
    clients = MetricClients(base, metric)
    assert (clients.n, clients.d, clients.dtype) == (base.n, base.d, base.dtype)
    z, vector = normal(CHAINS, D), normal(CHAINS, D, seed=5)
    values, gradients = clients.potential(z), clients.gradient(z)
    products, curvature, diagonal = clients.hvp(z, vector), clients.hessian(z), clients.diagonal(z)
    for i in range(base.n):
        potential = in_z(metric, base, i)
        for c in range(CHAINS):
            hessian = jacrev(jacrev(potential))(z[c])
            close(values[i, c], potential(z[c]))
            close(gradients[i, c], grad(potential)(z[c]))
            close(curvature[i, c], hessian)
            close(products[i, c], hessian @ vector[c])
            close(diagonal[i, c], hessian.diagonal())
    assert torch.equal(clients.rows, base.rows)


@pytest.mark.parametrize("name", NAMES)
def test_some_clients_and_minibatches_in_z(name: str) -> None:
    base, metric = softmax(), metric_of(name)[0]
    clients, z, keys = MetricClients(base, metric), normal(CHAINS, D), batch_keys(4)
    root, theta = matrix_of(metric), metric.push(z)
    close(clients.gradient(z, keys=keys, batch_size=2), base.gradient(theta, keys=keys, batch_size=2) @ root)
    some = torch.tensor([3, 1])
    close(clients.gradient(z, clients=some), clients.gradient(z)[some])
    close(clients.subset(some).gradient(z), clients.gradient(z)[some])
    close(clients.client(3).potential(z), clients.potential(z)[3:])


def test_the_identity_keeps_the_blocks_and_factors_of_the_model() -> None:
    base, z = softmax(), normal(D)
    clients = MetricClients(base, metric_of("identity")[0])
    theta = clients.metric.push(z)
    assert all(torch.equal(got, want) for got, want in zip(clients.blocks(), base.blocks(), strict=True))
    for got, want in zip(clients.factors(z), base.factors(theta), strict=True):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    close(clients.diagonal(z.unsqueeze(0)), base.diagonal(theta.unsqueeze(0)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_factors_in_z_are_the_whole_hessian(name: str) -> None:
    clients = MetricClients(softmax(), metric_of(name)[0])
    z = normal(D)
    (block,), ((outer, inner),) = clients.blocks(), clients.factors(z)
    hessian = clients.hessian(z.unsqueeze(0))[:, 0]
    assert torch.equal(block, torch.arange(D).unsqueeze(1))
    close(outer, hessian)
    close(inner, hessian.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None])


@pytest.mark.parametrize("leading", [(), (2,), (3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_the_prior_in_z(name: str, leading: tuple[int, ...]) -> None:
    metric = metric_of(name)[0]
    z, root = normal(*leading, D), matrix_of(metric)
    prior = MetricPrior(GaussianPrior.of_scale(0.5), metric)
    theta = metric.mean + z @ root.T
    close(prior.potential(z), 2 * theta.square().sum(-1))
    close(prior.gradient(z), 4 * theta @ root)
    flat = MetricPrior(GaussianPrior.of_scale(None), metric)
    assert torch.equal(flat.gradient(z), torch.zeros_like(z))
    assert torch.equal(flat.potential(z), torch.zeros(leading, dtype=F64))
