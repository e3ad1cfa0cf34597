"""The plan of the package: who may import whom, and whether `docs/architecture.md` has it as it is.

The order of the rooms is read from the table in that page. Every import counts, wherever it stands: at the top of a
module, under `TYPE_CHECKING`, inside a function, or as the text of a name that is imported later.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fedsample"
PAGE = ROOT / "docs" / "architecture.md"
MOST_AT_THE_ROOT = 6
SEARCHED = ("fedsample", "tests", "simulations", "docs", "scripts", ".ci", ".github")
SUFFIXES = {"", ".py", ".md", ".toml", ".service", ".proto", ".sh", ".txt", ".yml", ".yaml", ".cff", ".cpp"}

# Where things were before they had rooms, from fedsample/ on.
OLD = (
    *"assembly benchmark_table benchmarks chain cli cli_app cli_bench cli_certs cli_doctor cli_fleet".split(),
    *"cli_options cli_print cli_simulate distinct doubts exchange experiment kernels links messages paths".split(),
    *"messages/answers messages/metrics messages/names messages/requests messages/status messages/tensors".split(),
    *"kernels/baoab kernels/langevin".split(),
    *"preparation presets problem random remote_problem session step_check sums watch wire".split(),
    *"clients/device clients/exact clients/holding clients/resident clients/worker config/problems".split(),
    *"compression/bits compression/coins compression/pieces data/agree data/device data/fit".split(),
    *"diagnostics/covariance diagnostics/moments estimators/shift fleets/computing fleets/flower".split(),
    *"fleets/flower_grid/answer fleets/flower_grid/generators fleets/records fleets/roster fleets/simulation".split(),
    *(
        f"fleets/grpc/{name}"
        for name in (
            "address attend authority certs credentials desk doctor fleet flower_carrier flower_host flower_node "
            "frames handshake heads host hub identity packing presence probe room seat streams version"
        ).split()
    ),
    *"monitor/atomic monitor/fleet monitor/lossy monitor/report strategies/curvature strategies/prepare".split(),
    *"strategies/step targets/graphs targets/portions".split(),
)


class Import(NamedTuple):
    """One import of a module of the package by another."""

    source: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) imports {self.target}"


# --- reading ---------------------------------------------------------------------------------------------------------


@lru_cache
def modules(package: Path) -> dict[str, Path]:
    """Every module by its dotted name; a package stands for its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache
def exported(package: Path) -> frozenset[str]:
    """The names in the package's own `__all__`."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def targets(tree: ast.AST, name: str, is_package: bool, known: Collection[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the package in a file, its name as written there.

    Names that a package's module may define are cut off: `from fedsample.clients.oracle import Reference` imports
    `fedsample.clients.oracle`. Of the package itself they are kept.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "fedsample")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            if base.split(".")[0] == "fedsample":
                for alias in node.names:
                    deeper = f"{base}.{alias.name}"
                    yield node.lineno, deeper if deeper in known or base == "fedsample" else base
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.partition(":")[0]
            if "." in text and text in known:
                yield node.lineno, text


@lru_cache
def imports(package: Path) -> list[Import]:
    """Every import of one module of the package by another."""
    known = modules(package)
    found: dict[Import, None] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, target in targets(tree, name, path.name == "__init__.py", known):
            inside = target if target in known else target.rpartition(".")[0]
            if inside in known and inside != name:
                found[Import(name, line, inside)] = None
    return list(found)


def room_of(module: str) -> str:
    """The room of a module: the folder or file below the package."""
    return [*module.split("."), "__init__"][1]


def rooms(package: Path) -> set[str]:
    """What stands at the package's root: folders of modules, and single modules."""
    return {room_of(module) for module in modules(package)}


def floors(page: str) -> dict[str, int]:
    """Room -> floor, from the rows `| 3 | `config` | ...` of a page."""
    return {
        room: int(number)
        for number, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
        for room in re.findall(r"`(\w+)`", names)
    }


def files() -> Iterator[Path]:
    """Every text file of the checkout, or of an unpacked sdist, but the log of what has changed."""
    here = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for name in SEARCHED for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    for path in (*here, *below):
        if path.suffix in SUFFIXES and path.is_file() and path.name != "CHANGELOG.md":
            yield path


# --- judging ---------------------------------------------------------------------------------------------------------


def circle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """One circle of a graph, its first name again at the end; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        if source != target:
            graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])[::-1]
    return []


def module_circle(package: Path) -> list[str]:
    return circle((each.source, each.target) for each in imports(package))


def room_circle(package: Path) -> list[str]:
    return circle((room_of(each.source), room_of(each.target)) for each in imports(package))


def running_up(package: Path, floor: dict[str, int]) -> list[Import]:
    """Imports from another room that is not on a lower floor; the rooms must be known."""
    across = [each for each in imports(package) if room_of(each.source) != room_of(each.target)]
    return [each for each in across if floor[room_of(each.source)] <= floor[room_of(each.target)]]


def at_the_root(package: Path) -> list[str]:
    return sorted(path.name for path in package.iterdir() if path.is_file())


def leading_nowhere(package: Path, path: Path) -> list[str]:
    """Imports in a file of modules, or of public names, that the package does not have."""
    known, public = modules(package), exported(package)
    try:
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
    except ValueError:
        name = path.stem
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for line, target in targets(tree, name, path.name == "__init__.py", known):
        of_the_package = target.count(".") == 1 and target.rpartition(".")[2] in public
        if target not in known and not of_the_package:
            found.append(f"{path.name}:{line} imports {target}")
    return found


def old_names(text: str, package: Path) -> list[str]:
    """Names in a text under which modules are no longer found: from the package on, or in backticks from a room on."""
    found = []
    for name in OLD:
        pattern = rf"fedsample/{name}\.py\b"
        if not (package / name / "__init__.py").is_file():
            dotted = name.replace("/", r"\.")
            pattern += rf"|fedsample\.{dotted}\b|fedsample/{name}/"
            pattern += rf"|`{dotted}\b" if "/" in name or name in ("kernels", "messages") else ""
        found += re.findall(pattern, text)
    return found


# --- the package as it is --------------------------------------------------------------------------------------------


def test_no_circle_between_modules() -> None:
    assert not module_circle(PACKAGE)


def test_no_circle_between_rooms() -> None:
    assert not room_circle(PACKAGE)


def test_the_page_describes_every_room_and_no_other() -> None:
    described = floors(PAGE.read_text(encoding="utf-8"))
    assert set(described) == rooms(PACKAGE)


def test_no_import_runs_up() -> None:
    floor = floors(PAGE.read_text(encoding="utf-8"))
    up = running_up(PACKAGE, dict.fromkeys(rooms(PACKAGE), -1) | floor)
    assert not up, "\n".join(map(str, up))


def test_few_files_at_the_root() -> None:
    names = at_the_root(PACKAGE)
    assert len(names) <= MOST_AT_THE_ROOT, f"{len(names)} files in fedsample/: {', '.join(names)}; each needs a room"


def test_every_import_leads_somewhere() -> None:
    wrong = [each for path in files() if path.suffix == ".py" for each in leading_nowhere(PACKAGE, path)]
    assert not wrong, "\n".join(wrong)


def test_no_old_name_is_left() -> None:
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in files()
        if (names := old_names(path.read_text(encoding="utf-8"), PACKAGE))
    }
    assert not wrong


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|proto|cpp|md))`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 20
    missing = [name for name in sorted(named) if not any((base / name).exists() for base in (PACKAGE, ROOT))]
    assert not missing


def test_tests_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 10
    assert not [name for name in sorted(named) if f"def {name}(" not in text]


# --- each check fails where it should ---------------------------------------------------------------------------------

SOUND = {
    "__init__.py": '__all__ = ["run"]\n_LAZY = {"run": "fedsample.top.face"}\n',
    "base/__init__.py": "from fedsample.base.first import one\n",
    "base/first.py": "one = 1\n",
    "base/second.py": "from fedsample.base.first import one\n",
    "top/__init__.py": "",
    "top/face.py": "from fedsample.base import second\n\n\ndef run():\n    from fedsample.base.first import one\n",
}
FLOORS = {"base": 1, "top": 2, "__init__": 3}

CIRCLES = {
    "at the top": {"base/first.py": "from fedsample.base.second import one\n"},
    "in a function": {"base/first.py": "def late():\n    from fedsample.base import second\n"},
    "under TYPE_CHECKING": {
        "base/first.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedsample.base.second\n"
    },
    "relative": {"base/first.py": "from . import second\n"},
    "as text": {"base/first.py": 'SECOND = "fedsample.base.second:one"\n'},
    "through the package's face": {"base/first.py": "from fedsample.base import one\n"},
}
UPWARD = {
    "at the top": {"base/first.py": "from fedsample.top.face import run\n"},
    "in a function": {"base/first.py": "def late():\n    from fedsample.top import face\n"},
    "under TYPE_CHECKING": {
        "base/first.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fedsample.top.face import run\n"
    },
    "relative": {"base/first.py": "from ..top.face import run\n"},
    "as text": {"base/first.py": 'FACE = "fedsample.top.face"\n'},
    "the package itself": {"top/face.py": "import fedsample\n"},
    "a public name": {"top/face.py": "def late():\n    from fedsample import run\n"},
}


def planted(folder: Path, changes: dict[str, str]) -> Path:
    """A small package that is in order but for the changes."""
    for name, text in (SOUND | changes).items():
        path = folder / "fedsample" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "fedsample"


def test_a_sound_package_passes(tmp_path: Path) -> None:
    package = planted(tmp_path, {})
    assert module_circle(package) == room_circle(package) == running_up(package, FLOORS) == []
    assert rooms(package) == set(FLOORS)
    assert not any(leading_nowhere(package, path) for path in package.rglob("*.py"))


@pytest.mark.parametrize("changes", CIRCLES.values(), ids=CIRCLES)
def test_a_planted_circle_is_seen(changes: dict[str, str], tmp_path: Path) -> None:
    found = module_circle(planted(tmp_path, changes))
    assert "fedsample.base.first" in found
    assert found[0] == found[-1]


def test_rooms_in_a_circle_are_seen_where_no_modules_are(tmp_path: Path) -> None:
    package = planted(tmp_path, {"top/tool.py": "", "base/third.py": "from fedsample.top import tool\n"})
    assert not module_circle(package)
    assert set(room_circle(package)) == {"base", "top"}


@pytest.mark.parametrize("changes", UPWARD.values(), ids=UPWARD)
def test_a_planted_import_that_runs_up_is_seen(changes: dict[str, str], tmp_path: Path) -> None:
    found = running_up(planted(tmp_path, changes), FLOORS)
    assert [each.source.split(".")[1] for each in found] == [next(iter(changes)).split("/")[0]]


def test_rooms_on_one_floor_do_not_import_each_other(tmp_path: Path) -> None:
    found = running_up(planted(tmp_path, {}), {"base": 1, "top": 1, "__init__": 3})
    assert {each.target for each in found} == {"fedsample.base.first", "fedsample.base.second"}


@pytest.mark.parametrize(
    "text",
    ["import fedsample.gone\n", "from fedsample.base.gone import one\n", "def f():\n    from fedsample import gone\n"],
)
def test_an_import_that_leads_nowhere_is_seen(text: str, tmp_path: Path) -> None:
    package = planted(tmp_path, {"base/first.py": text})
    assert len(leading_nowhere(package, package / "base" / "first.py")) == 1


def test_a_room_without_a_row_is_seen(tmp_path: Path) -> None:
    package = planted(tmp_path, {"cellar/__init__.py": ""})
    page = "| 1 | `base` | x |\n| 2 | `top` | `face` |\n| 3 | `__init__` | y |\n"
    assert floors(page) == FLOORS
    assert rooms(package) - set(floors(page)) == {"cellar"}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("from fedsample" + ".wire import Parcel", True),
        ("see [it](../fedsample" + "/wire.py)", True),
        ("fedsample" + ".clients.worker.Worker", True),
        ("fedsample" + "/problem.py", True),
        ("see `" + "messages.requests`", True),
        ("see `" + "diagnostics.moments`", True),
        ("fedsample.problem.build, fedsample/problem/build.py", False),
        ("fedsample.protocol.wire, fedsample.wireless", False),
    ],
)
def test_an_old_name_is_seen(text: str, seen: bool) -> None:
    assert bool(old_names(text, PACKAGE)) is seen
