"""Exact quantities that a server may ask of its clients, and their size on the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.wire import DENSE, TRIANGLE, Form
from fedsample.targets import Clients, MetricClients
from fedsample.targets.metric import Identity, mirrored


def evaluate(clients: Clients, name: str, points: Tensor, vector: Tensor | None) -> dict[str, Tensor]:
    """Compute one quantity for every client -> tensors (n, ...) by name; the server wants their sums over clients.

    Args:
        clients: in the coordinates of the points.
        name: one of `exchange.EXACT`.
        points: (C, d).
        vector: (C, d), for products with the Hessian.
    """
    if name == "value":
        return {name: clients.potential(points)}
    if name == "gradient":
        return {name: clients.gradient(points)}
    if name == "squared_gradient":
        return {name: clients.gradient(points).square()}
    if name == "gradient_variance":  # of each client's gradient, over the points
        return {name: clients.gradient(points).var(1)}
    if name == "hessian":
        return {name: mirrored(clients.hessian(points[:1])[:, 0])}
    if name == "diagonal":
        return {name: clients.diagonal(points[:1])[:, 0]}
    if name == "factors":
        pairs = clients.factors(points[0])
        sides = ("outer", "inner")
        return {f"{side}{b}": mirrored(pair[j]) for b, pair in enumerate(pairs) for j, side in enumerate(sides)}
    if vector is None:
        raise ValueError(f"{name} needs a vector")
    product = clients.hvp(points, vector)
    if name == "hvp":
        return {name: product}
    squares = product.square().mean(1)  # over the vectors, which are all probes
    return {name: squares if name == "squared_hvp" else squares * clients.diagonal(points[:1])[:, 0]}


def is_symmetric(name: str) -> bool:
    """Whether an output is a symmetric matrix, of which one triangle is sent."""
    return name == "hessian" or name.startswith(("outer", "inner"))


def exact_bits(name: str, tensor: Tensor) -> int:
    """Bits of one client's tensor (without the client axis); of symmetric matrices one triangle is sent."""
    width = 8 * tensor.element_size()
    if is_symmetric(name):
        side = tensor.shape[-1]
        return width * (side * (side + 1) // 2)
    return width * tensor.numel()


def point_bits(points: Tensor) -> int:
    """Bits of points on the downlink."""
    return 8 * points.element_size() * points.numel()


def exact_forms(request: Request, blocks: Sequence[Tensor]) -> dict[str, Form]:
    """List the forms of the arrays in which one client's exact outputs arrive.

    Args:
        request: the request.
        blocks: flat positions of the parameter matrices, needed for factors only.
    """
    c, d = request.points.shape
    dtype = request.points.dtype
    forms = {}
    for name in request.outputs - {ESTIMATE}:
        if name == "value":
            forms[name] = Form(DENSE, (c,), torch.float64)
        elif name == "hessian":
            forms[name] = Form(TRIANGLE, (d, d), dtype)
        elif name in ("diagonal", "squared_hvp", "cubed_hvp", "gradient_variance"):
            forms[name] = Form(DENSE, (d,), dtype)
        elif name == "factors":
            for b, positions in enumerate(blocks):
                for side, size in zip(("outer", "inner"), positions.shape, strict=True):
                    forms[f"{side}{b}"] = Form(TRIANGLE, (size, size), dtype)
        else:
            forms[name] = Form(DENSE, (c, d), dtype)
    return forms


def widest(clients: MetricClients, outputs: frozenset[str]) -> int:
    """Count the entries of the largest matrix of one client that these outputs need; 1 for none."""
    metric, d = clients.metric, clients.base.d
    if "hessian" in outputs or (outputs & {"diagonal", "cubed_hvp", "factors"} and not isinstance(metric, Identity)):
        return d * d
    if "factors" in outputs:
        return sum(rows**2 + columns**2 for rows, columns in (block.shape for block in clients.base.blocks()))
    return 1
