"""Exact quantities: what clients compute at points, whose sums over clients a server may ask for. One row each.

Forms on the wire, bits, limits, the memory that a computation needs, and the table of docs/devices/protocol.md follow
from the rows; a new quantity is a row here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.wire import DENSE, TRIANGLE, Form
from fedsample.targets import Clients, MetricClients
from fedsample.targets.metric import Identity, mirrored

Compute = Callable[[Clients, Tensor, Tensor], Sequence[Tensor]]


class Output(NamedTuple):
    """One array of a quantity.

    Attributes:
        name: on the wire; with "{b}" there is one for each parameter matrix, by its number.
        dims: one client's axes: "P" points, "d" parameters, "out" and "in" sides of the parameter matrix.
        dtype: "chain", that of the points, or "float64".
        symmetric: whether the last two axes are a symmetric matrix, of which one triangle travels.
    """

    name: str
    dims: str
    dtype: Literal["chain", "float64"] = "chain"
    symmetric: bool = False


class Sizes(NamedTuple):
    """What shapes depend on.

    Attributes:
        points: number of points P.
        d: number of parameters.
        dtype: of the points.
        blocks: (out, in) of the parameter matrices, in the coordinates of the points.
    """

    points: int
    d: int
    dtype: torch.dtype
    blocks: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Quantity:
    """Something that each client computes at points, of which the server gets the sum over clients.

    Attributes:
        name: in a request's `outputs`.
        summary: what it is, for the protocol's page.
        outputs: its arrays.
        compute: (clients, points (P, d), vectors (P, d)) -> its arrays, in order, (n, ...) each.
        needs_vector: whether vectors come with the points.
        through_hessian: whether, in other coordinates than the model's, each client's d x d Hessian is computed for it.
    """

    name: str
    summary: str
    outputs: tuple[Output, ...]
    compute: Compute
    needs_vector: bool = False
    through_hessian: bool = False

    def __post_init__(self) -> None:
        if len({"{b}" in output.name for output in self.outputs}) != 1:
            raise ValueError(f"{self.name}: either all arrays are of a parameter matrix, or none")

    @property
    def per_block(self) -> bool:
        """Whether there are arrays for each parameter matrix."""
        return any("{b}" in output.name for output in self.outputs)

    def forms(self, sizes: Sizes) -> dict[str, Form]:
        """The forms of one client's arrays by name."""
        count = len(sizes.blocks) if self.per_block else 1
        return {output.name.format(b=b): _form(output, b, sizes) for b in range(count) for output in self.outputs}

    def evaluate(self, clients: Clients, points: Tensor, vector: Tensor | None) -> dict[str, Tensor]:
        """Compute it for every client -> arrays (n, ...) by name; symmetric ones exactly so.

        Args:
            clients: in the coordinates of the points.
            points: (P, d).
            vector: (P, d), for products with the Hessian.

        Raises:
            ValueError: if it needs vectors and there are none, or computes other arrays than it declares.
        """
        if self.needs_vector and vector is None:
            raise ValueError(f"{self.name} needs a vector")
        computed = self.compute(clients, points, points if vector is None else vector)
        if len(computed) % len(self.outputs) or not (self.per_block or len(computed) == len(self.outputs)):
            raise ValueError(f"{self.name} computes {len(computed)} arrays, but declares {len(self.outputs)}")
        found = {}
        for at, each in enumerate(computed):
            b, place = divmod(at, len(self.outputs))
            output = self.outputs[place]
            found[output.name.format(b=b)] = mirrored(each) if output.symmetric else each
        return found


def _form(output: Output, b: int, sizes: Sizes) -> Form:
    out, into = sizes.blocks[b] if "{b}" in output.name else (0, 0)
    lengths = {"P": sizes.points, "d": sizes.d, "out": out, "in": into}
    shape = tuple(lengths[axis] for axis in output.dims.split())
    dtype = torch.float64 if output.dtype == "float64" else sizes.dtype
    return Form(TRIANGLE if output.symmetric else DENSE, shape, dtype)


def _squared_products(clients: Clients, points: Tensor, vector: Tensor) -> Tensor:
    """Mean over the vectors, which are all probes, of the squared products with the Hessian -> (n, d)."""
    return clients.hvp(points, vector).square().mean(1)


def _factors(clients: Clients, points: Tensor, _: Tensor) -> list[Tensor]:
    return [side for pair in clients.factors(points[0]) for side in pair]


QUANTITIES: Mapping[str, Quantity] = {
    row.name: row
    for row in (
        Quantity(
            "value",
            "the potential summed over the client's rows, without the prior",
            (Output("value", "P", "float64"),),
            lambda clients, points, _: [clients.potential(points)],
        ),
        Quantity(
            "gradient",
            "its gradient",
            (Output("gradient", "P d"),),
            lambda clients, points, _: [clients.gradient(points)],
        ),
        Quantity(
            "value_and_gradient",
            "both, in one pass over the rows",
            (Output("value", "P", "float64"), Output("gradient", "P d")),
            lambda clients, points, _: clients.value_and_gradient(points),
        ),
        Quantity(
            "squared_gradient",
            "the squares of the gradient's entries",
            (Output("squared_gradient", "P d"),),
            lambda clients, points, _: [clients.gradient(points).square()],
        ),
        Quantity(
            "gradient_variance",
            "the variance of the client's gradient over the points",
            (Output("gradient_variance", "d"),),
            lambda clients, points, _: [clients.gradient(points).var(1)],
        ),
        Quantity(
            "hessian",
            "the Hessian; of networks the Fisher information",
            (Output("hessian", "P d d", symmetric=True),),
            lambda clients, points, _: [clients.hessian(points)],
            through_hessian=True,
        ),
        Quantity(
            "diagonal",
            "the diagonal of the Hessian, at the first point",
            (Output("diagonal", "d"),),
            lambda clients, points, _: [clients.diagonal(points[:1])[:, 0]],
            through_hessian=True,
        ),
        Quantity(
            "factors",
            "Kronecker factors of each parameter matrix, at the first point",
            (Output("outer{b}", "out out", symmetric=True), Output("inner{b}", "in in", symmetric=True)),
            _factors,
            through_hessian=True,
        ),
        Quantity(
            "hvp",
            "the product of the Hessian with `vector`",
            (Output("hvp", "P d"),),
            lambda clients, points, vector: [clients.hvp(points, vector)],
            needs_vector=True,
        ),
        Quantity(
            "squared_hvp",
            "the mean over the points of the squares of `hvp`",
            (Output("squared_hvp", "d"),),
            lambda clients, points, vector: [_squared_products(clients, points, vector)],
            needs_vector=True,
        ),
        Quantity(
            "cubed_hvp",
            "`squared_hvp` times the diagonal of the Hessian at the first point",
            (Output("cubed_hvp", "d"),),
            lambda clients, points, vector: [
                _squared_products(clients, points, vector) * clients.diagonal(points[:1])[:, 0]
            ],
            needs_vector=True,
            through_hessian=True,
        ),
    )
}


def exact_names(request: Request) -> list[str]:
    """Names of the exact quantities that a request asks for, in the order in which they are computed."""
    return sorted(request.outputs - {ESTIMATE})


def unsound_outputs(outputs: Iterable[str]) -> str:
    """Say why no request can ask for these outputs together; empty: one can."""
    outputs = set(outputs)
    known = {ESTIMATE, *QUANTITIES}
    if not outputs or not outputs <= known:
        return f"asks for {sorted(outputs)}, expected some of {sorted(known)}"
    arrays = [array.name for name in sorted(outputs - {ESTIMATE}) for array in QUANTITIES[name].outputs]
    if twice := sorted({name for name in arrays if arrays.count(name) > 1}):
        return f"asks for {sorted(outputs)}, which hold {', '.join(twice)} twice"
    return ""


def exact_forms(request: Request, blocks: Sequence[Tensor] = ()) -> dict[str, Form]:
    """List the forms of the arrays in which one client's exact outputs arrive.

    Args:
        request: the request.
        blocks: flat positions (out, in) of the parameter matrices, needed for factors only.
    """
    points, d = request.points.shape
    sizes = Sizes(points, d, request.points.dtype, [_sides(each) for each in blocks])
    found: dict[str, Form] = {}
    for name in exact_names(request):
        found |= QUANTITIES[name].forms(sizes)
    return found


def _sides(block: Tensor) -> tuple[int, int]:
    return len(block), block.shape[1]


def per_block(names: Iterable[str]) -> bool:
    """Whether the forms of these outputs depend on the parameter matrices."""
    return any(QUANTITIES[name].per_block for name in set(names) - {ESTIMATE})


def symmetric_arrays(request: Request) -> Callable[[str], bool]:
    """Whether an array of a request's exact outputs holds symmetric matrices, of which one triangle travels."""
    outputs = [output for name in exact_names(request) for output in QUANTITIES[name].outputs if output.symmetric]
    named = re.compile("|".join(re.escape(output.name).replace(r"\{b\}", r"\d+") for output in outputs) or "(?!)")
    return lambda array: named.fullmatch(array) is not None


def point_bits(points: Tensor) -> int:
    """Bits of points on the downlink."""
    return 8 * points.element_size() * points.numel()


def widest(clients: MetricClients, request: Request) -> int:
    """Count the entries of the matrices of one client that these outputs need at the same time; 1 for none."""
    d, entries = clients.base.d, 1
    blocks = clients.base.blocks() if per_block(request.outputs) else []
    sizes = Sizes(len(request.points), d, request.points.dtype, [_sides(each) for each in blocks])
    for name in exact_names(request):
        quantity = QUANTITIES[name]
        if quantity.through_hessian and not isinstance(clients.metric, Identity):
            entries = max(entries, d * d)
        shapes = [form.shape for form in quantity.forms(sizes).values() if form.stype == TRIANGLE]
        entries = max(entries, sum(map(math.prod, shapes)))
    return entries


def markdown() -> str:
    """The table of docs/devices/protocol.md."""
    lines = ["| output | arrays | what it is |", "|---|---|---|"]
    for row in QUANTITIES.values():
        arrays = "; ".join(map(_described, row.outputs))
        lines.append(f"| `{row.name}` | {arrays} | {row.summary} |")
    return "\n".join(lines) + "\n"


def _described(output: Output) -> str:
    axes = output.dims.split()
    shape = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    kind = " float64" if output.dtype == "float64" else ""
    return f"`{output.name.replace('{b}', '<b>')}` {shape}{kind}{', triangle' if output.symmetric else ''}"
