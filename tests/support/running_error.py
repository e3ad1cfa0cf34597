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

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from rounding import ELEMENTARY, SEES, assert_within, gamma, unit
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fedsample.random import Key

_DRAWS = ("normal", "uniform", "bernoulli", "integers", "integers64", "permutation", "subset", "subsets")
_FLOATS = (torch.float32, torch.float64)
_FREE = frozenset(  # copies and choices of entries: errors travel as the entries do
    "clone cat stack index index_select gather flip roll where repeat constant_pad_nd triu tril diag_embed "
    "masked_fill new_empty new_empty_strided empty_like empty empty_strided copy copy_ lift_fresh_copy "
    "select_scatter slice_scatter unfold_copy take".split()
)
_CONSTANT = frozenset(
    "zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full fill fill_ zero_ eye arange linspace "
    "randn rand normal scalar_tensor randperm normal_ uniform_ sign sgn floor ceil round trunc eq ne lt le gt ge "
    "uniform isnan isinf isfinite argmax argmin argsort one_hot all any nonzero frac".split()
)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_RESHAPED = frozenset("squeeze_ unsqueeze_ transpose_ t_ detach_ as_strided_ set_".split())


def _size(x: Any) -> Any:
    return x.detach().to(torch.float64).abs() if isinstance(x, Tensor) else abs(x)


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
        shadow = self._shadows.get(tensor.untyped_storage()._cdata) if tensor.dtype in _FLOATS else None
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
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype in _FLOATS and not x.is_meta]
        if not results or name in _RESHAPED or (not writes and _aliases(results, args)):
            return out
        base = name.rstrip("_") if in_place else name
        found = _Rule(lambda x: self._error(x) if isinstance(x, Tensor) else 0.0)(func, base, out, before, kwargs)
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
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype in _FLOATS and not x.is_meta]
        if not results or name in _RESHAPED | _FREE or (not writes and _aliases(results, args)):
            return out
        exact = lambda x: torch.zeros(x.shape, dtype=torch.float64) if isinstance(x, Tensor) else 0.0  # noqa: E731
        own = _Rule(exact, likely=True)(func, name.rstrip("_") if writes else name, out, before, kwargs)
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


class _Rule:
    """The errors of one operation's results.

    Args:
        error: of each operand. likely: whether the n roundings inside a sum add as independent ones do.
    """

    def __init__(self, error: Callable[[Any], Any], likely: bool = False) -> None:
        self.error, self.likely = error, likely

    def gamma(self, roundings: float, dtype: torch.dtype) -> float:
        """Of n roundings in a sum: n u at most, sqrt(n) u as their root mean square."""
        return gamma(math.sqrt(roundings) if self.likely else roundings, dtype)

    def __call__(self, func: Any, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        if name in _CONSTANT or (name.startswith("new_empty") or name.startswith("empty")):
            return [torch.zeros(x.shape, dtype=torch.float64) for x in _tensors(out)]
        if name in _FREE:
            return self._free(func, args, kwargs)
        rule = getattr(self, f"_{name.lstrip('_')}", None)
        if rule is not None:
            error = rule(out, *args, **kwargs)
            return list(error) if isinstance(error, tuple) else [error]
        if func in decomposition_table:
            return self._composed(func, out, args, kwargs)
        raise NotImplementedError(f"no rule for the rounding of {func}; add one to {__file__}")

    def _composed(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """As PyTorch says that it is composed of others, step by step."""
        inner = RunningError()

        def enter(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
                return x
            copy = x.clone()
            inner._set(copy, self.error(x))
            return copy

        entered = tree_map(enter, args), tree_map(enter, kwargs)
        with inner:
            made = decomposition_table[func](*entered[0], **entered[1])
        return [inner._error(x) for x in tree_leaves(made) if isinstance(x, Tensor) and x.dtype in _FLOATS]

    def _free(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        def moved(x: Any) -> Any:
            if isinstance(x, Tensor) and x.dtype in _FLOATS:
                return self.error(x)
            return x

        name = func._schema.name.removeprefix("aten::")
        given = tree_map(moved, args)
        if name in ("masked_fill", "masked_fill_"):
            given = (*given[:2], 0.0)
        if name == "constant_pad_nd":
            given = (*given[:2], 0.0)
        if name == "copy_":
            rounded = unit(args[0].dtype) * _size(args[1]) if args[0].dtype == torch.float32 else 0.0
            extra = rounded if isinstance(args[1], Tensor) and args[1].dtype == torch.float64 else 0.0
            return [self.error(args[1]) + extra if isinstance(args[1], Tensor) else torch.zeros(args[0].shape)]
        keep = {key: value for key, value in kwargs.items() if key != "dtype"}
        return _tensors(func(*given, **keep))

    # --- roundings ----------------------------------------------------------------------------------------------------

    def own(self, out: Tensor, roundings: float = 1) -> Tensor:
        """What the operation itself adds: |fl(x) - x| <= u |fl(x)| (Higham 2002, eq. 2.5), and what underflows.

        An arithmetic operation loses half of the smallest subnormal, an elementary function all that is subnormal.
        """
        info = torch.finfo(out.dtype)
        return self.gamma(roundings, out.dtype) * _size(out) + info.tiny * (info.eps if roundings == 1 else 1)

    def _to_copy(self, out: Tensor, x: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor):
            return torch.zeros(out.shape, dtype=torch.float64)
        wide = x.dtype == torch.float64 or x.dtype == torch.int64
        error = self.error(x) if x.dtype in _FLOATS else torch.zeros(x.shape, dtype=torch.float64)
        return error + (unit(out.dtype) * _size(out) if wide and out.dtype == torch.float32 else 0.0)

    def _neg(self, out: Tensor, x: Tensor) -> Tensor:
        return self.error(x)

    _abs = _detach = _alias = _expand = _view = _relu = _neg  # type: ignore[assignment]

    def _clamp(self, out: Tensor, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return self.error(x)

    _clamp_min = _clamp_max = _clamp

    def _add(self, out: Tensor, a: Any, b: Any, alpha: float = 1) -> Tensor:
        return self.error(a) + abs(alpha) * self.error(b) + self.own(out)

    _sub = _add

    def _rsub(self, out: Tensor, a: Any, b: Any, alpha: float = 1) -> Tensor:
        return self._add(out, b, a, alpha)

    def _mul(self, out: Tensor, a: Any, b: Any) -> Tensor:
        return self.error(a) * _size(b) + _size(a) * self.error(b) + self.error(a) * self.error(b) + self.own(out)

    def _div(self, out: Tensor, a: Any, b: Any, **kwargs: Any) -> Tensor:
        least = _size(b) - self.error(b)
        if isinstance(least, Tensor):
            least = least.clamp(min=torch.finfo(torch.float64).tiny)
        return (self.error(a) + _size(out) * self.error(b)) / least + self.own(out)

    def _reciprocal(self, out: Tensor, x: Tensor) -> Tensor:
        return self._div(out, 1.0, x)

    def _square(self, out: Tensor, x: Tensor) -> Tensor:
        return self._mul(out, x, x)

    def _pow(self, out: Tensor, x: Any, power: Any) -> Tensor:
        assert isinstance(x, Tensor)
        assert isinstance(power, int | float)
        e, size = self.error(x), _size(x)
        if float(power) == 2.0:
            return self._mul(out, x, x)
        least = (size - e).clamp(min=1e-300) if power < 1 else size + e
        return abs(power) * least ** (power - 1) * e + self.own(out, ELEMENTARY)

    def _sqrt(self, out: Tensor, x: Tensor) -> Tensor:
        return self.error(x) / (2 * (x.double() - self.error(x)).clamp(min=1e-300).sqrt()) + self.own(out)

    def _rsqrt(self, out: Tensor, x: Tensor) -> Tensor:
        least = (x.double() - self.error(x)).clamp(min=1e-300)
        return self.error(x) / (2 * least**1.5) + self.own(out, ELEMENTARY)

    def _exp(self, out: Tensor, x: Tensor) -> Tensor:
        return _size(out) * torch.expm1(self.error(x)) + self.own(out, ELEMENTARY)

    def _log(self, out: Tensor, x: Tensor) -> Tensor:
        return self.error(x) / (_size(x) - self.error(x)).clamp(min=1e-300) + self.own(out, ELEMENTARY)

    def _log1p(self, out: Tensor, x: Tensor) -> Tensor:
        return self.error(x) / (1 + x.double() - self.error(x)).clamp(min=1e-300) + self.own(out, ELEMENTARY)

    def _tanh(self, out: Tensor, x: Tensor) -> Tensor:
        return self.error(x) * (1 - _size(out) ** 2) * torch.exp(2 * self.error(x)) + self.own(out, ELEMENTARY)

    def _sigmoid(self, out: Tensor, x: Tensor) -> Tensor:
        slope = _size(out) * torch.sigmoid(-x.double())  # grows by at most exp(e) within e
        return self.error(x) * slope * torch.exp(self.error(x)) + self.own(out, ELEMENTARY + 2)

    def _sum(self, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        def total(each: Tensor) -> Tensor:
            return each.sum() if dim is None else each.sum(dim, keepdim)

        if x.dtype not in _FLOATS:
            return torch.zeros(out.shape, dtype=torch.float64)
        n = max(1, x.numel() // max(1, out.numel()) - 1)
        return total(self.error(x)) + self.gamma(n, out.dtype) * total(_size(x))

    def _mean(self, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        n = max(1, x.numel() // max(1, out.numel()))
        return self._sum(out, x, dim, keepdim) / n + self.own(out)

    def _var(self, out: Tensor, x: Tensor, dim: Any = None, correction: float = 1, keepdim: bool = False) -> Tensor:
        n = x.numel() // max(1, out.numel())
        over = tuple(range(x.ndim)) if dim is None else dim
        mean = x.double().mean(over, keepdim=True)
        middle = self.error(x).mean(over, True) + self.gamma(n + 1, x.dtype) * _size(x).mean(over, True)
        offset = (x.double() - mean).abs()
        each = self.error(x) + middle + unit(x.dtype) * offset
        squares = 2 * offset * each + each.square() + self.gamma(n + 2, x.dtype) * offset.square()
        return squares.sum(over, keepdim) / (n - correction) + self.own(out)

    def _amax(self, out: Tensor, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        return self.error(x).amax(dim, keepdim)

    def _max(self, out: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        if not rest:
            return self.error(x).max()
        return self.error(x).amax(*rest) if isinstance(rest[0], int) else self._maximum(out, x, *rest)

    def _min(self, out: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        if not rest:
            return self.error(x).max()
        return self.error(x).amax(*rest) if isinstance(rest[0], int) else self._minimum(out, x, *rest)

    def _maximum(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_a, low_b = a.double() - self.error(a), b.double() - self.error(b)
        high_a, high_b = a.double() + self.error(a), b.double() + self.error(b)
        either = torch.maximum(self.error(a), self.error(b))
        return torch.where(low_a > high_b, self.error(a), torch.where(low_b > high_a, self.error(b), either))

    def _minimum(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_a, low_b = a.double() - self.error(a), b.double() - self.error(b)
        high_a, high_b = a.double() + self.error(a), b.double() + self.error(b)
        either = torch.maximum(self.error(a), self.error(b))
        return torch.where(high_a < low_b, self.error(a), torch.where(high_b < low_a, self.error(b), either))

    def _logsumexp(self, out: Tensor, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        """Log of a sum whose terms are off by e, and by u |x - max| and `ELEMENTARY`: none moves it by more."""
        n = max(1, x.numel() // max(1, out.numel()))
        top = _size(out if keepdim else out.unsqueeze(dim[0] if isinstance(dim, list) else dim))
        each = self.error(x) + unit(x.dtype) * (_size(x) + top)
        return each.amax(dim, keepdim) + self.gamma(n + 2 * ELEMENTARY, x.dtype) + self.own(out)

    def bilinear(self, act: Callable[[Any, Any], Tensor], a: Tensor, b: Tensor, n: int) -> Tensor:
        """Sums of n products a b: gamma_n |A| |B| + e_A |B| + (|A| + e_A) e_B."""
        narrow = torch.float32 if torch.float32 in (a.dtype, b.dtype) else torch.float64
        first, second = _size(a), _size(b)
        if self.likely:  # an operation's own rounding alone
            return self.gamma(max(1, n), narrow) * act(first, second)
        grown = act(self.error(a), second) + act(first + self.error(a), self.error(b))
        return grown + self.gamma(max(1, n), narrow) * act(first, second)

    def _mm(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.bilinear(torch.matmul, a, b, a.shape[-1])

    _bmm = _mv = _dot = _mm

    def _addmm(self, out: Tensor, c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        assert beta == alpha == 1
        return self.error(c) + self.bilinear(torch.matmul, a, b, a.shape[-1] + 1) + self.own(out) + self.own(c)

    _baddbmm = _addmm

    def _convolution(self, out: Tensor, x: Tensor, w: Tensor, bias: Any, *rest: Any) -> Tensor:
        n = w[0].numel() + 1
        error = self.bilinear(lambda a, b: torch.ops.aten.convolution(a, b, None, *rest), x, w, n)
        if bias is None:
            return error
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return error + (self.error(bias) + unit(bias.dtype) * _size(bias)).view(shape) + self.own(out)

    def _convolution_backward(
        self, out: Any, g: Tensor, x: Tensor, w: Tensor, sizes: Any, *rest: Any
    ) -> tuple[Tensor, ...]:
        *rest, mask = rest
        back = torch.ops.aten.convolution_backward
        found = []
        if mask[0]:
            n = w.numel() // w.shape[1]
            act = lambda a, b: back(a, torch.zeros_like(x.double()), b, sizes, *rest, [True, False, False])[0]  # noqa: E731
            found.append(self.bilinear(act, g, w, n))
        if mask[1]:
            n = g.numel() // g.shape[1]
            act = lambda a, b: back(a, b, torch.zeros_like(w.double()), sizes, *rest, [False, True, False])[1]  # noqa: E731
            found.append(self.bilinear(act, g, x, n))
        if mask[2]:
            over = [0, *range(2, g.ndim)]
            found.append(self._sum(out[2], g, over))
        return tuple(found)

    def _linalg_eigh(self, out: Any, x: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Values move by no more than the matrix does, in norm (Weyl); of vectors nothing is said without the gaps.

        A stable solver's values are those of a matrix whose entries are off by gamma_3n of its size (section 18.2).
        """
        n = x.shape[-1]
        moved = self.error(x).square().sum((-2, -1)).sqrt()
        moved = moved + self.gamma(3 * n, x.dtype) * _size(x).square().sum((-2, -1)).sqrt()
        return moved.unsqueeze(-1).expand(out[0].shape), torch.full(out[1].shape, torch.inf, dtype=torch.float64)

    def _linalg_svd(self, out: Any, x: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As for eigenvalues: singular values move by no more than the matrix does."""
        moved = self.error(x).square().sum((-2, -1)).sqrt()
        moved = moved + self.gamma(3 * max(x.shape[-2:]), x.dtype) * _size(x).square().sum((-2, -1)).sqrt()
        unknown = [torch.full(each.shape, torch.inf, dtype=torch.float64) for each in (out[0], out[2])]
        return unknown[0], moved.unsqueeze(-1).expand(out[1].shape), unknown[1]

    def _linalg_inv_ex(self, out: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """|d(A^-1)| <= |A^-1|^2 |dA|, with A off by gamma_3n of its norm besides (theorem 9.4, growth 1)."""
        moved = self.error(x).square().sum((-2, -1)).sqrt()
        moved = moved + self.gamma(3 * x.shape[-1], x.dtype) * _size(x).square().sum((-2, -1)).sqrt()
        inverse = torch.linalg.matrix_norm(out[0].double(), 2)
        return (inverse.square() * moved)[..., None, None].expand(out[0].shape)

    def _linalg_qr(self, out: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Factors of a matrix that is off by gamma_mn of its norm (theorem 19.4); the basis turns cond(A) times as far.

        |dQ|_F <= sqrt(2) cond(A) |dA|_F / |A|_2, and |dR|_F as that times |A|_2 (section 19.9, after Sun 1991).
        """
        singular = torch.linalg.svdvals(x.double())
        most, least = singular.amax(-1), singular.amin(-1).clamp(min=1e-300)
        off = self.error(x).square().sum((-2, -1)).sqrt() + self.gamma(x[..., :, :].numel(), x.dtype) * most
        turned = (math.sqrt(2) * off / least)[..., None, None]
        return turned.expand(out[0].shape), (turned * most[..., None, None]).expand(out[1].shape)

    def _index_add(self, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
        error = self.error(x).index_add(dim, index, self.error(source))
        size = _size(x).index_add(dim, index, _size(source))
        return error + self.gamma(len(index), out.dtype) * size

    def _index_put(self, out: Tensor, x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
        if not accumulate:
            return torch.ops.aten.index_put(self.error(x), indices, self.error(values))
        ends = [torch.ops.aten.index_put(f(x), indices, f(values), True) for f in (self.error, _size)]
        return ends[0] + self.gamma(values.numel(), out.dtype) * ends[1]

    def _scatter_add(self, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        ends = [f(x).scatter_add(dim, index, f(source)) for f in (self.error, _size)]
        return ends[0] + self.gamma(index.shape[dim] if index.ndim else 1, out.dtype) * ends[1]

    def _scatter(self, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Any, **kwargs: Any) -> Tensor:
        return self.error(x).scatter(dim, index, self.error(source))

    def _max_pool2d_with_indices(self, out: Any, x: Tensor, *rest: Any) -> Tensor:
        return torch.ops.aten.max_pool2d_with_indices(self.error(x), *rest)[0]

    def _avg_pool2d_backward(self, out: Tensor, g: Tensor, x: Tensor, *rest: Any) -> Tensor:
        ends = [torch.ops.aten.avg_pool2d_backward(f(g), x.double(), *rest) for f in (self.error, _size)]
        return ends[0] + self.gamma(x.numel() // max(1, g.numel()) + 2, out.dtype) * ends[1]

    def _avg_pool2d(self, out: Tensor, x: Tensor, *rest: Any) -> Tensor:
        n = x.numel() // max(1, out.numel()) + 1
        ends = [torch.ops.aten.avg_pool2d(f(x), *rest) for f in (self.error, _size)]
        return ends[0] + self.gamma(n, out.dtype) * ends[1] + self.own(out)


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def _exactly(draw: Callable[..., Any]) -> Callable[..., Any]:
    """What keys draw is the same number everywhere: input, not arithmetic."""

    def exact(self: Key, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return draw(self, *args, **kwargs)

    return exact
