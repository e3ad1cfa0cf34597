"""Running error analysis of whatever PyTorch computes: a bound of the rounding errors in every array, made as it runs.

    with RunningError() as analysis:
        one, other = this_way(), that_way()
        analysis.close(one, other)

Inside, each operation is done as always, on its own kernels; beside it a float64 array says how far each entry may
lie from exact arithmetic on the inputs (Wilkinson; Higham 2002, section 3.3). An operation adds its own rounding,
u |result| or gamma_n times the sum of the sizes of its n terms, in any order, to what its operands bring:

    a + b: e_a + e_b      a b: e_a |b| + |a| e_b + e_a e_b      f(a): the largest slope of f within e_a of a, times e_a

An elementary function is off by `ELEMENTARY` roundings. So two ways to the same mathematics differ by at most the sum
of their two bounds, on any processor and any library. The bound adds sizes, never signs: it is right for one gradient
or a stack of a few layers, and grows too fast to be of use over many rounds of a chain. Comparisons (a mask, an argmax)
are taken as they fall. What is drawn from keys is exact input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from rounding import SEES, assert_within
from rounding_rules import FLOATS, FREE, RESHAPED, Rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fedsample.random import Key

_DRAWS = ("normal", "uniform", "bernoulli", "integers", "integers64", "permutation", "subset", "subsets")
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class RunningError(TorchDispatchMode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._shadows: dict[int, Tensor] = {}  # by storage, the error of each of its entries
        self._kept: list[Any] = []
        self._undo: list[tuple[str, Any]] = []

    def __enter__(self) -> RunningError:
        for name in _DRAWS:
            if (original := getattr(Key, name, None)) is not None:
                self._undo.append((name, original))
                setattr(Key, name, _exactly(original))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._undo:
            setattr(Key, *self._undo.pop())

    # --- what tests ask ---------------------------------------------------------------------------------------------

    def error(self, tensor: Tensor) -> Tensor:
        """A bound (float64, the tensor's shape) of the rounding errors in what was computed in this context."""
        with _disable_current_modes():
            return self._error(tensor.detach())

    def close(self, got: Tensor, want: Tensor, *, sees: float | None = None, what: str = "") -> None:
        """Pass iff the two differ by no more than the roundings that each was made with; see `assert_within`."""
        with _disable_current_modes():
            bound = self._error(got.detach()) + self._error(want.detach())
            assert_within(got, want, bound, sees=sees, what=what)

    def given(self, tensor: Tensor, error: Tensor | float) -> Tensor:
        """Say how far the entries of an array lie from what they stand for, where this analysis cannot know it."""
        with _disable_current_modes():
            self._set(tensor.detach(), torch.as_tensor(error, dtype=torch.float64).expand(tensor.shape))
        return tensor

    # --- errors beside arrays ---------------------------------------------------------------------------------------

    def _error(self, tensor: Tensor) -> Tensor:
        shadow = self._shadows.get(tensor.untyped_storage()._cdata) if tensor.dtype in FLOATS else None
        if shadow is None:
            return torch.zeros(tensor.shape, dtype=torch.float64)
        return shadow.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _set(self, tensor: Tensor, error: Tensor) -> None:
        storage = tensor.untyped_storage()
        at = storage._cdata
        if at not in self._shadows:
            self._shadows[at] = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.float64)
            self._kept.append(storage)  # lives as long as the analysis, so that none takes its place in memory
        self._shadows[at].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _composed(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        name, in_place = _named(func)
        writes = in_place or "out" in kwargs
        before = (args[0].clone(), *args[1:]) if in_place else args
        if in_place:
            self._set(before[0], self._error(args[0]))
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype in FLOATS and not x.is_meta]
        if not results or name in RESHAPED or (not writes and _aliases(results, args)):
            return out
        base = name.rstrip("_") if in_place else name
        found = Rule(lambda x: self._error(x) if isinstance(x, Tensor) else 0.0)(func, base, out, before, kwargs)
        for result, error in zip(results, found, strict=False):
            self._set(result, error.broadcast_to(result.shape))
        return out


@cache
def _composed(func: Any) -> bool:
    """Whether an operation has no kernel of its own: PyTorch itself makes it of others."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _named(func: Any) -> tuple[str, bool]:
    """An operation's name, and whether it writes into its first operand."""
    schema = func._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    return schema.name.rpartition("::")[2], first is not None and first.is_write


def _aliases(results: list[Tensor], args: tuple[Any, ...]) -> bool:
    """Whether all results are views of operands."""
    given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(x.untyped_storage()._cdata in given for x in results)


class OwnRoundings(TorchDispatchMode):
    """Every operation's result is off by its own rounding, with random signs, times `scale`."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        self.generator, self.scale = torch.Generator().manual_seed(seed), scale

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _composed(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        name, writes = _named(func)
        before = (args[0].clone(), *args[1:]) if writes else args
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype in FLOATS and not x.is_meta]
        if not results or name in RESHAPED | FREE or (not writes and _aliases(results, args)):
            return out
        exact = lambda x: torch.zeros(x.shape, dtype=torch.float64) if isinstance(x, Tensor) else 0.0  # noqa: E731
        own = Rule(exact, likely=True)(func, name.rstrip("_") if writes else name, out, before, kwargs)
        for result, error in zip(results, own, strict=False):
            if bool(error.any()):
                signs = torch.randint(0, 2, result.shape, generator=self.generator) * 2.0 - 1.0
                result.add_((self.scale * error * signs).to(result.dtype))
        return out


def assert_same_in_norm(
    *ways: Callable[[], Tensor], leading: int = 1, scale: float = 4.0, responses: int = 4
) -> list[Tensor]:
    """Pass iff the ways' results differ by no more than roundings do, in the norm over all but the leading axes.

    A bound that adds sizes through a deep network is of no use: each layer multiplies it by the norm of its absolute
    values. Here roundings add as independent ones do, sqrt(n) u in a sum of n terms and by their squares from one
    operation to the next (Higham & Mary 2019, doi 10.1137/18M1226312: beyond lambda root mean squares with a
    probability of at most 2 exp(-lambda^2 / 2)); the network itself carries them on. lambda is `LIKELY`. The first way
    is tried; the others make as many roundings, of the same sizes.

    Args:
        ways: each computes the same. leading: axes that are compared each for itself. scale: of the roundings that are
            tried: above those of the computation itself, and the response linear. responses: random signs tried; one
            will do where a norm is over thousands of entries.
    """
    found = [way() for way in ways]
    bound = 2 * LIKELY * response(ways[0], leading=leading, scale=scale, responses=responses)
    for other in found[1:]:
        apart, size = ((found[0] - x).double().flatten(leading).norm(dim=-1) for x in (other, torch.zeros_like(other)))
        assert_within(apart, torch.zeros_like(apart), bound)
        assert bool((bound <= SEES[other.dtype] * size).all()), f"a bound of {bound} on sizes {size} sees nothing"
    return found


def response(way: Callable[[], Tensor], *, leading: int = 1, scale: float = 4.0, responses: int = 4) -> Tensor:
    """The root mean square, over random signs, of the norm by which roundings move a result; see above."""
    plain = way()
    squares = torch.zeros(plain.shape[:leading], dtype=torch.float64)
    for seed in range(responses):
        with OwnRoundings(seed, scale):
            moved = way()
        squares += ((moved - plain).detach().double() / scale).reshape(*plain.shape[:leading], -1).square().sum(
            -1
        ) / responses
    return squares.sqrt()


LIKELY = 8.0  # 2 exp(-32) = 3e-14


def _exactly(draw: Callable[..., Any]) -> Callable[..., Any]:
    """What keys draw is the same number everywhere: input, not arithmetic."""

    def exact(self: Key, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return draw(self, *args, **kwargs)

    return exact
