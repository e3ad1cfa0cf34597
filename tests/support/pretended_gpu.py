"""A pretended GPU: tensors that lie on the CPU and say "cuda", and refuse to meet those that do not say so.

    python pretended_gpu.py

Runs, in this process, what a machine without a GPU can know of the code for one: that arrays are where they are used,
that a function which is recorded as a CUDA graph does not wait for the device, and that results are the CPU's, bit for
bit (it is the CPU that computes). Prints what was compared. No kernel, stream or graph of CUDA takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
FACTORIES = {torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.eye, torch.tensor}
NEW = {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full}
LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select")
waiting_allowed = True


class There(Tensor):
    """A tensor on the pretended GPU, around the one that holds its numbers."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # to PyTorch's own C++ it is on the CPU: there is nothing else
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype
        )
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def here(value: Any) -> Any:
    return value.elem if isinstance(value, There) else value


def leaves(values: Any) -> list[Any]:
    """What lies in tuples, lists and dictionaries, which is all that operations are given."""
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return [values]
    return [leaf for each in values for leaf in leaves(each)]


def each(function: Callable[[Any], Any], values: Any) -> Any:
    """The same with a function of every leaf in its place."""
    if isinstance(values, dict):
        return {name: each(function, value) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)([each(function, value) for value in values])
    return function(values)


def waits(what: str) -> None:
    if not waiting_allowed:
        raise RuntimeError(f"called a synchronizing operation: {what}")


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: computed on the CPU, refused where a GPU would refuse it."""
    tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in tensors if isinstance(leaf, There)]
    others = [leaf for leaf in tensors if not isinstance(leaf, There) and leaf.ndim > 0]
    name = str(func)
    index = name.startswith(("aten.index.", "aten.index_put", "aten._index_put"))
    if there and others and not name.startswith("aten.copy"):
        if not (index and isinstance(args[0], There)):
            raise RuntimeError(f"{name}: arrays on different devices, {[tuple(leaf.shape) for leaf in others]} on cpu")
        waits(f"{name} by an index from the host")
    if index and any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in args[1]):
        waits(f"{name} by a mask")
    if there and name.startswith(READS):
        waits(name)
    goes = bool(there)
    if name.startswith("aten.copy"):
        goes = isinstance(args[0], There)
        if goes != isinstance(args[1], There):
            waits(name)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        goes = goes and (name.startswith("aten._to_copy") or ".new_" in name or "_like" in name)
    known = {id(leaf.elem): leaf for leaf in there}  # in place: the result is an argument
    result = func(*each(here, args), **each(here, kwargs))

    def wrap(value: Any) -> Any:
        if not goes or not isinstance(value, Tensor) or isinstance(value, There):
            return value
        return known.get(id(value)) if id(value) in known else There(value)

    return each(wrap, result)


class Dispatch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch's compiler has nothing to do here, and need not be asked at every operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """What C++ would do by itself on a GPU: makes tensors there, moves them, says where they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func == Tensor.device.__get__:
            return CUDA if isinstance(first, There) else func(*args)
        if isinstance(first, There) and func in (Tensor.numpy, Tensor.tolist):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            waits("tolist")
            return first.elem.tolist()
        if func is torch.nn.functional.one_hot and isinstance(first, There):
            return There(func(first.elem, *args[1:]))
        if isinstance(first, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(first):
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if func in FACTORIES and device is not None and torch.device(device).type == "cuda":
            if func is torch.tensor:
                waits("torch.tensor")
            return There(func(*args, **{**kwargs, "device": "cpu"}))
        if func in NEW or func in LIKE:
            device = kwargs.pop("device", None)
            goes = isinstance(first, There) if device is None else torch.device(device).type == "cuda"
            made = func(here(first), *args[1:], **kwargs)
            return There(made) if goes else made
        if func in (Tensor.to, Tensor.cpu):
            return moved(func, args, kwargs)
        return func(*args, **kwargs)


def moved(func: Any, args: Any, kwargs: Any) -> Any:
    source, given = args[0], [*args[1:], *kwargs.values()]
    devices = [torch.device(each) for each in given if isinstance(each, str | torch.device)]
    devices += [CUDA if isinstance(each, There) else each.device for each in given if isinstance(each, Tensor)]
    devices += [torch.device("cpu")] if func is Tensor.cpu else []
    if devices and devices[0].type == "meta":
        return func(*args, **kwargs)
    goes = devices[0].type == "cuda" if devices else isinstance(source, There)
    dtypes = [each for each in given if isinstance(each, torch.dtype)]
    dtypes += [each.dtype for each in given if isinstance(each, Tensor)]
    if goes != isinstance(source, There):
        waits("a copy between devices")
        source = There(source.detach().clone()) if goes else source.elem.clone()
    if not dtypes or source.dtype == dtypes[0]:
        return source
    return source.type(dtypes[0])


def record(self: Any, function: Callable[..., Tensor], inputs: Any) -> tuple[Callable[[], None], Tensor]:
    """In place of a CUDA graph: as strict while it is recorded, and computed anew with each replay."""
    global waiting_allowed
    waiting_allowed = False
    try:
        result = function(*inputs).clone().fill_(torch.nan)
    finally:
        waiting_allowed = True

    def replay() -> None:
        result.copy_(function(*inputs))

    return replay, result


def pretend() -> None:
    """From now on there is a GPU in this process."""
    from fedsample.targets import cuda_graphs

    def set_mode(mode: int | str) -> None:
        global waiting_allowed
        waiting_allowed = mode not in ("error", 2)

    class Stream:
        def __init__(self, device: torch.device) -> None:
            """Nothing waits for it."""

    replaced = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1, "Stream": Stream,
        "graph_pool_handle": lambda: 0, "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": set_mode,
    }  # fmt: skip
    for name, instead in replaced.items():
        setattr(torch.cuda, name, instead)
    cuda_graphs.CudaRecorder.record = record  # type: ignore[method-assign]
    Dispatch().__enter__()
    Calls().__enter__()


# --- what is run ------------------------------------------------------------------------------------------------------


def gradients(relative: float) -> None:
    """Every path of regressions and networks, from all rows and minibatches, of all clients and some.

    The kernels are the CPU's: those of regressions give its bits, those of networks (by `vmap`, or one by one) others.
    """
    from test_cuda_graphs import every_way, network, regression

    assert 0 < relative < 1e-2
    for make in (regression, network):
        plain, on_gpu = make(), make(device="cuda")
        plain, eager = (each.on("stacked") if make is regression else each for each in (plain, on_gpu))
        pairs = zip(every_way(plain, plain, (1,)), every_way(eager, on_gpu.on("cuda-graph"), (1,)), strict=True)
        for (want, _), (without, found) in pairs:
            assert found.device == without.device == CUDA
            assert torch.equal(found.cpu(), without.cpu())
            apart, size = ((x).double().flatten(2).norm(dim=-1) for x in (found.cpu() - want, want))
            assert bool((apart <= (0.0 if make is regression else relative) * size).all())
        print("gradients", type(plain).__name__)


def rounds(preset: str, model: str, rounds: int, fleet: dict[str, Any], **more: Any) -> None:
    """Rounds on the GPU and on the CPU, preparation included."""
    from fedsample.config import load
    from fedsample.runs.build import assemble

    data = {"name": "breast_cancer" if model == "logistic" else "wine", "clients": 4}
    from rounding import gamma, propagated

    ends: list[Tensor] = []
    same_path = "stacked" if model == "logistic" else "batched"  # what a graph records; see `fleets.engines`
    for device, engine in (("cpu", same_path), ("cuda", "auto")):
        settings = {"preset": preset, "chains": 2, "dtype": "float64", "data": data, "model": {"name": model}}
        settings |= more
        chain = assemble(load({**settings, "fleet": {**fleet, "device": device, "engine": engine}}, environment={}))
        for _ in range(rounds):
            chain.round()
        ends.append(chain.state.params)
    assert ends[1].device == CUDA
    # Its own step may be off in the last bits. A round adds the roundings of a few hundred terms; the rounds after it
    # carry them on by at most 1 + h L / q, for a curvature L and a link that sends a coordinate with probability q.
    inclusion = chain.driver.uplink.compressor.inclusion(chain.problem.d)
    growth = 1 + chain.driver.sampler.step_size * chain.prepared.geometry.curvature / inclusion
    size = growth * max(1.0, float(ends[0].abs().max()))
    bound = propagated(2 * gamma(512) * size, growth, rounds)
    assert bound < 1e-7, bound
    assert float((ends[1].cpu() - ends[0]).abs().max()) <= bound
    print("rounds", preset, model, chain.fleet.engine)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from test_cuda_graphs import network, own_roundings

    relative = own_roundings(network())
    pretend()
    gradients(relative)
    soon = {"step_size": 1e-4, "start": {"at": "zeros"}}  # without a search for the mode
    rounds("langevin-marina", "logistic", 5, {})
    rounds("underdamped-diana", "logistic", 10, {"participation": 2, "loss": 0.1}, **soon)
    whole = {"uplink": {"compressor": "randk", "k": 0.25}}  # QSGD's levels could turn on a last bit
    rounds("qlsd-plus-plus", "mlp", 5, {"participation": 2}, **soon, **whole)
