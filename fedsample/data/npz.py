"""Read arrays from a numpy archive, unchanged."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedsample.data.base import Array, check_finite, default_feature_names
from fedsample.data.table import Table, nearest
from fedsample.errors import DataError

_KNOWN = ("X", "y", "client", "X_test", "y_test")


def read_npz(path: Path) -> Table:
    """Read `X` (N, ...features), `y` (N,), and where present `client` (N,), `X_test`, `y_test`.

    `y` may hold integers, floats or text; `client` integers or text. Nothing is standardised and no row is held out
    unless the configuration asks for it. Other arrays in the file are ignored, unless one looks like a misspelling.

    Raises:
        DataError: if it is not an archive, has a missing or misspelled array, pickled objects, or shapes that do not
            fit.
    """
    arrays = read_archive(path)
    for name in arrays:
        missing = [known for known in _KNOWN if known not in arrays]
        if name not in _KNOWN and (hint := nearest(name, missing)):
            raise DataError(
                f"{path.name} holds an array {name!r}, which has no meaning here.{hint} Rename or remove it"
            )
    for name in ("X", "y"):
        if name not in arrays:
            raise DataError(f"{path.name} has no array {name!r}: it holds {', '.join(map(repr, arrays)) or 'nothing'}")
    if ("X_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path.name} has only one of 'X_test' and 'y_test': give both or neither")
    x, y = _features(path, "X", arrays["X"]), _targets(path, "y", arrays["y"], len(arrays["X"]))
    x_test = y_test = owners = None
    if "X_test" in arrays:
        x_test = _features(path, "X_test", arrays["X_test"])
        y_test = _targets(path, "y_test", arrays["y_test"], len(x_test))
        if x_test.shape[1:] != x.shape[1:]:
            raise DataError(f"{path.name}: X_test has rows of shape {x_test.shape[1:]}, but X of shape {x.shape[1:]}")
        if (y.dtype.kind == "U") != (y_test.dtype.kind == "U"):
            raise DataError(
                f"{path.name}: y has dtype {y.dtype}, but y_test has {y_test.dtype}: expected the same kind"
            )
    if "client" in arrays:
        owners = arrays["client"]
        if owners.shape != (len(x),) or owners.dtype.kind not in "iuU":
            raise DataError(
                f"{path.name}: client has shape {owners.shape} and dtype {owners.dtype}, expected ({len(x)},) integers "
                "or text, the client of each row of X"
            )
    return Table(path.stem, x, y, (), owners, x_test, y_test)


def read_archive(path: Path) -> dict[str, Array]:
    """Read all arrays of an .npz file, without unpickling.

    Raises:
        DataError: if the file is no numpy archive, cannot be read, or holds pickled objects.
    """
    try:
        with path.open("rb") as stream:  # given a path, numpy leaves the file open when it is damaged
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path.name} is a single array, expected an archive: write it with numpy.savez")
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds pickled objects" if "allow_pickle" in str(error) else str(error).rstrip(".")
        raise DataError(
            f"cannot read {path.name} as a numpy archive: {reason}. Expected the output of numpy.savez with plain "
            "numeric or text arrays; pickled objects are refused because loading them can run code"
        ) from error


def _features(path: Path, name: str, values: Array) -> Array:
    if values.ndim < 2 or 0 in values.shape[1:] or values.dtype.kind not in "biuf":
        raise DataError(
            f"{path.name}: {name} has shape {values.shape} and dtype {values.dtype}, expected real numbers of shape "
            "(rows, features) or (rows, height, width[, channels])"
        )
    check_finite(values, default_feature_names(values.shape[1:]), f"{name} in {path.name}")
    return values if values.dtype == np.float32 else values.astype(np.float64, copy=False)


def _targets(path: Path, name: str, values: Array, rows: int) -> Array:
    if values.shape == (rows, 1):
        values = values[:, 0]
    if values.shape != (rows,) or values.dtype.kind not in "biufU":
        raise DataError(
            f"{path.name}: {name} has shape {values.shape} and dtype {values.dtype}, expected ({rows},), one number or "
            "one piece of text a row of the features"
        )
    check_finite(values, (name,), path.name)
    return values.astype(np.int64) if values.dtype.kind in "biu" else values
