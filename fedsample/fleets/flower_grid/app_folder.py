"""A Flower app as a folder: its pyproject.toml, and its two apps imported without installing anything."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsample.errors import ConfigError
from fedsample.fleets.flower_grid import adapter
from fedsample.fleets.flower_grid.adapter import Value

_App = TypeVar("_App", ServerApp, ClientApp)


@dataclass(frozen=True)
class AppFolder:
    """An app's settings in pyproject.toml.

    Attributes:
        path: the folder.
        server: `module:attribute` of the ServerApp.
        client: `module:attribute` of the ClientApp.
        config: the run configuration, with dotted keys.
        nodes: number of nodes in its default federation; None: not stated.
        name: of the project; empty: not stated.
        version: of the project; empty: not stated.
    """

    path: Path
    server: str
    client: str
    config: dict[str, Value]
    nodes: int | None
    name: str = ""
    version: str = ""


def read_app(folder: Path) -> AppFolder:
    """Read an app's pyproject.toml.

    Raises:
        ConfigError: if there is none, it cannot be read, or it names no components.
    """
    path = folder.absolute()
    file = path / "pyproject.toml"
    if not file.is_file():
        raise ConfigError(f"{folder}: there is no pyproject.toml; give the folder of a Flower app, which holds one")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no valid TOML: {error}") from error
    flower = _table(_table(content, "tool", file), "flwr", file)
    app = _table(flower, "app", file)
    components = _table(app, "components", file)
    references = [components.get(name) for name in ("serverapp", "clientapp")]
    for name, reference in zip(("serverapp", "clientapp"), references, strict=True):
        if not isinstance(reference, str) or not all(reference.partition(":")):
            raise ConfigError(
                f"{file}: {name} in [tool.flwr.app.components] is {reference!r}, expected 'module:attribute', such as "
                f"'{'server' if name == 'serverapp' else 'client'}_app:app'"
            )
    config = adapter.flat(_table(app, "config", file), f"{file}, [tool.flwr.app.config]")
    project = content.get("project")
    name, version = (str(project.get(key, "")) if isinstance(project, Mapping) else "" for key in ("name", "version"))
    return AppFolder(path, str(references[0]), str(references[1]), config, _nodes(flower), name or path.name, version)


@contextmanager
def imported(app: AppFolder) -> Iterator[tuple[ServerApp, ClientApp]]:
    """Import the two apps, for as long as the context lasts; until then they may import from their folder.

    Raises:
        ConfigError: if a component cannot be imported, or has the wrong type.
    """
    with _importable(app):
        yield _component(app, app.server, ServerApp), _component(app, app.client, ClientApp)


@contextmanager
def imported_server(app: AppFolder) -> Iterator[ServerApp]:
    """Import the ServerApp alone: the ClientApp's dependencies need not be installed. See `imported`."""
    with _importable(app):
        yield _component(app, app.server, ServerApp)


@contextmanager
def imported_client(app: str) -> Iterator[ClientApp]:
    """Import the ClientApp alone, from a folder or as `module:attribute` from the current directory. See `imported`."""
    if ":" in app and not Path(app).is_dir():
        found = AppFolder(Path.cwd(), "", app, {}, None)
    else:
        found = read_app(Path(app))
    with _importable(found):
        yield _component(found, found.client, ClientApp)


@contextmanager
def _importable(app: AppFolder) -> Iterator[None]:
    """Put the app's folder first on the search path, for as long as the context lasts.

    The search path and the loaded modules are restored at the end, so that another app may use the same names.
    """
    path, before, ours = list(sys.path), set(sys.modules), _names(app)
    hidden = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ours and not _lies_in(module, app.path)
    }
    for name in hidden:
        del sys.modules[name]
    sys.path[:0] = map(str, _roots(app))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        fresh = {name: module for name, module in sys.modules.items() if name not in before or name in hidden}
        for name in [name for name, module in fresh.items() if _lies_in(module, app.path)]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _component(app: AppFolder, reference: str, kind: type[_App]) -> _App:
    """Import the object that a reference names."""
    module, _, attributes = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        raise ConfigError(
            f"{app.path}: the {kind.__name__} {reference!r} cannot be imported: {type(error).__name__}: {error}; see "
            "[tool.flwr.app.components] in pyproject.toml, and install what the app depends on"
        ) from error
    if not isinstance(found, kind):
        raise ConfigError(f"{app.path}: {reference!r} is of type {type(found).__name__}, expected {kind.__name__}")
    return found


def _roots(app: AppFolder) -> list[Path]:
    """The app's import roots: its folder, and `src` inside it if a component lies only there."""
    src = app.path / "src"
    only_there = any(_holds(src, name) and not _holds(app.path, name) for name in _tops(app))
    return [app.path, src] if only_there else [app.path]


def _holds(root: Path, name: str) -> bool:
    return bool(name) and ((root / name).is_dir() or (root / f"{name}.py").is_file())


def _tops(app: AppFolder) -> set[str]:
    """The top-level modules or packages of the components' references."""
    return {reference.partition(":")[0].partition(".")[0] for reference in (app.server, app.client)}


def _names(app: AppFolder) -> set[str]:
    """The modules and packages in an app's folder."""
    roots = _roots(app)
    modules = {file.stem for root in roots for file in root.glob("*.py")}
    return _tops(app) | modules | {file.parent.name for root in roots for file in root.glob("*/__init__.py")}


def _lies_in(module: ModuleType, folder: Path) -> bool:
    places = [getattr(module, "__file__", None), *_paths(module)]
    return any(place is not None and Path(place).is_relative_to(folder) for place in places)


def _paths(module: ModuleType) -> list[str]:
    """The search paths of a package; a namespace package has no file of its own."""
    try:
        return [str(each) for each in module.__path__]
    except Exception:  # not a package, or a lazy module that fails to load
        return []


def _table(parent: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    """Read a table of pyproject.toml; only that of the components is required."""
    found = parent.get(name, {})
    if not isinstance(found, Mapping) or (name == "components" and not found):
        raise ConfigError(
            f"{file}: no table [tool.flwr.app.components] that names a serverapp and a clientapp, so this is no Flower "
            "app"
        )
    return found


def _nodes(flower: Mapping[str, Any]) -> int | None:
    """`options.num-supernodes` of the default federation, where apps stated it before Flower 1.26."""
    federations = flower.get("federations", {})
    default = federations.get(federations.get("default"), {}) if isinstance(federations, Mapping) else {}
    options = default.get("options", {}) if isinstance(default, Mapping) else {}
    number = options.get("num-supernodes") if isinstance(options, Mapping) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else None
