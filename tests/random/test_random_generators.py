"""Keyed randomness alone: no generator anywhere in the package, and none that it moves."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedsample
import fedsample.random.keys
import fedsample.random.subsets
from fedsample.compression import RandK
from fedsample.estimators import Diana, Links
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import LocalFleet
from fedsample.random import Key, key
from fedsample.strategies import Baoab, Cohort, Driver, Stability
from fedsample.targets import GaussianPrior, GeneralizedLinear
from fedsample.targets.metric import Identity

_TORCH_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "dropout", "alpha_dropout", "manual_seed", "seed", "initial_seed",
    "get_rng_state", "set_rng_state", "fork_rng", "Generator", "default_generator", "random", "distributions",
    "init", "kaiming_uniform_", "xavier_uniform_",
}  # fmt: skip
_METHODS = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_",
    "multinomial", "manual_seed", "manual_seed_all",
}  # fmt: skip


def generators(source: str, *, seeded_numpy: bool) -> list[str]:
    """Every use of a generator with a state, as 'line: name'; `seeded_numpy` allows numpy's default_rng(seed)."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # local name -> what it stands for
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names[each.asname or each.name.split(".")[0]] = each.name if each.asname else each.name.split(".")[0]
                if each.name.split(".")[0] == "random" or each.name.startswith("numpy.random"):
                    found.append(f"{node.lineno}: import {each.name}")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for each in node.names:
                names[each.asname or each.name] = f"{node.module}.{each.name}"
                if node.module.split(".")[0] == "random":
                    found.append(f"{node.lineno}: from random import {each.name}")

    def path(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            root = path(node.value)
            return f"{root}.{node.attr}" if root else ""
        return ""

    allowed = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and seeded_numpy
        and path(node.func) == "numpy.random.default_rng"
        and (node.args or node.keywords)
        and not any(isinstance(a, ast.Constant) and a.value is None for a in node.args)
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name) or id(node) in inner or id(node) in allowed:
            continue
        parts = path(node).split(".")
        draws = parts[0] == "torch" and any(part in _TORCH_DRAWS for part in parts[1:])
        fills = isinstance(node, ast.Attribute) and node.attr in _METHODS
        if draws or fills or parts[:2] == ["numpy", "random"]:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return sorted(set(found))


PLANTED = [
    "import torch\nx = torch.randn(3)",
    "import torch as t\nx = t.rand(3)",
    "from torch import randint\nx = randint(0, 3, (1,))",
    "from torch import randn as draw\nx = draw(3)",
    "import torch\ntorch.manual_seed(0)",
    "import torch\ntorch.cuda.manual_seed_all(0)",
    "import torch\ndraw = torch.randperm",
    "import torch\ng = torch.Generator()",
    "import torch\nx = torch.empty(3).normal_()",
    "def f(x):\n    return x.uniform_(0, 1)",
    "def f(x):\n    x.bernoulli_(0.5)\n    return x",
    "def f(x):\n    return x.random_()",
    "import torch\nx = torch.multinomial(w, 3)",
    "def f(w):\n    return w.multinomial(3)",
    "from torch.distributions import Normal\nx = Normal(0, 1)",
    "from torch import nn\nnn.init.zeros_(w)",
    "from torch.nn import functional as F\ny = F.dropout(x)",
    "import random\nx = random.random()",
    "from random import shuffle\nshuffle(x)",
    "import random as r",
    "import numpy as np\nnp.random.seed(0)",
    "import numpy as np\nx = np.random.normal()",
    "import numpy as np\nx = np.random.RandomState(0)",
    "import numpy\nx = numpy.random.shuffle(y)",
    "from numpy import random\nx = random.rand(3)",
    "from numpy.random import normal\nx = normal()",
    "import numpy.random",
    "import numpy as np\nrng = np.random.default_rng()",
    "import numpy as np\nrng = np.random.default_rng(None)",
    "import numpy as np\nmake = np.random.default_rng",
]
HARMLESS = [
    "from fedsample.random import key\nx = key(0).normal(3)",
    "import fedsample.random\nx = fedsample.random.key(0).uniform(2)",
    "from fedsample import random\nx = random.key(0)",
    "import torch\nx = torch.zeros(3).sum()\nnormal = 1",
    "'torch.randn and np.random.seed in a docstring'",
    "from fedsample.compression import RandK\nx = RandK(3)",
]
SEEDED = "import numpy as np\nx = np.random.default_rng(0).permutation(9)"


@pytest.mark.parametrize("source", PLANTED)
def test_the_scan_sees_a_planted_generator(source: str) -> None:
    assert generators(source, seeded_numpy=True)
    assert generators(source, seeded_numpy=False)


@pytest.mark.parametrize("source", HARMLESS)
def test_the_scan_passes_what_is_harmless(source: str) -> None:
    assert generators(source, seeded_numpy=False) == []


def test_the_scan_allows_a_seeded_generator_where_asked() -> None:
    assert generators(SEEDED, seeded_numpy=True) == []
    assert generators(SEEDED, seeded_numpy=False)


def test_no_file_of_the_package_uses_a_generator() -> None:
    root = Path(fedsample.__file__).parent
    # An installed package has the benchmarks in `bench`: what they compare with draws as its users would.
    # Flower's apps draw from the global generators: `global_rng.py` keeps both sides' states apart, for them alone.
    apart = root / "fleets" / "flower_grid" / "global_rng.py"
    files = sorted(each for each in root.rglob("*.py") if root / "bench" not in each.parents and each != apart)
    assert len(files) > 40
    assert root / "random" / "keys.py" in files
    assert apart.exists()
    found = {
        str(file.relative_to(root)): uses
        for file in files
        # A dataset's published rule may name numpy's generator and its seed; nothing else may.
        if (uses := generators(file.read_text(encoding="utf-8"), seeded_numpy=file.parent == root / "data"))
    }
    assert found == {}


def sample_a_little() -> Tensor:
    """A few rounds of everything that draws: noise, momenta, coins, cohorts, masks, minibatches, faults."""
    keys = key(5, purpose="data")
    x, y = keys.normal(40 * 3).view(40, 3), keys.integers(2, 40)
    clients = GeneralizedLinear(x, y, torch.tensor([0, 10, 25, 40]), "categorical", 2)
    uplink = Diana(RandK(0.5))
    faults = Faults(3, 5, loss=0.2, dropout=0.05, dropout_rounds=2.0)
    fleet = LocalFleet(clients, uplink, 5, 2, batch_size=4, faults=faults)
    sampler = Driver(
        Baoab(step_size=0.05, temperature=1.0, seed=5, friction=1.0),
        Links(uplink),
        GaussianPrior(1.0),
        Identity(torch.zeros(clients.d, dtype=torch.float64)),
        cohort=Cohort(3, 2, 5, 2),
        stability=Stability(1.0, 1.0, 1e6),
    )
    state = sampler.begin(torch.zeros(2, clients.d, dtype=torch.float64))
    for _ in range(20):
        request = sampler.request(state)
        state = sampler.update(state, request, fleet.exchange(request))
    return state.params


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Fails if the global generators of torch, numpy or Python have moved."""

    def states() -> tuple[bytes, ...]:
        legacy = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().numpy().tobytes(), repr(legacy).encode(), repr(random.getstate()).encode()

    before = states()
    yield
    assert states() == before, "a global generator has moved"


def test_sampling_leaves_the_global_generators_alone_and_ignores_them() -> None:
    with untouched_generators():
        first = sample_a_little()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.manual_seed(77)
        np.random.seed(77)  # noqa: NPY002
        random.seed(77)
        again = sample_a_little()
        for move in (lambda: torch.rand(1), lambda: np.random.rand(), random.random):  # noqa: NPY002
            with pytest.raises(AssertionError, match="moved"), untouched_generators():  # the guard can fail
                move()
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    assert torch.equal(first, again)
    assert bool(torch.isfinite(first).all())
    assert float(first.std()) > 0


@pytest.mark.parametrize(("n", "start", "end"), [(100, 20, 40), (70_000, 0, 70_000), (200_003, 0, 10_000),
    (200_003, 190_003, 200_003), (200_003, 77_777, 90_000), (1 << 17, 5, 6)])  # fmt: skip
def test_places_of_a_permutation_are_those_of_the_whole(
    n: int, start: int, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a large one without making the whole, which is what is left where the guess fails."""
    keys = [key(seed, purpose="places") for seed in range(3)]
    whole = [one.permutation(n) for one in keys]
    if n > 1 << 16:
        monkeypatch.delattr(Key, "permutation")
    for one, places in zip(keys, whole, strict=True):
        assert torch.equal(one.permuted(n, start, end), places[start:end])
