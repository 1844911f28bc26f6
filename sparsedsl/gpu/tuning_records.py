"""What was measured of the generated kernels: keys and records, their store (beside the machine's calibration), and files of them.

Nothing out of a store or a file is trusted: a record that is not whole, or that names a config which the GPU at hand cannot run, counts as
absent, with one note. Loads neither torch nor Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsedsl.errors import SparseDSLError
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import Target
from sparsedsl.plain_values import Reported
from sparsedsl.settings import settings
from sparsedsl.tuning.store import Store

__all__ = [
    "Imported",
    "Record",
    "TuningKey",
    "clear",
    "density_class",
    "export",
    "import_",
    "recall",
    "records",
    "remember",
    "tuning_key",
]

KIND = "kernel config"
# Raised when what a record means changes: the order of programs, what is timed, a field. Older records are then not looked at.
METHOD = 1
FILE_FORMAT = 1

logger = logging.getLogger("sparsedsl")

_noted: set[Path] = set()


@dataclass(frozen=True)
class TuningKey:
    """What the fastest config depends on. ``pattern``: the key of the pattern and of how its source is written; ``density``: from
    :func:`density_class`; ``device``: product, architecture and number of SMs; versions of what compiles."""

    pattern: str
    kernel: str
    shape: Shape
    density: str
    device: str
    torch: str
    triton: str

    def to_json(self) -> dict[str, Any]:
        """The key for a :class:`~sparsedsl.tuning.store.Store`."""
        return {"kind": KIND, "method": METHOD, **asdict(self)}


def tuning_key(pattern: str, kernel: str, shape: Shape, density: str, target: Target) -> TuningKey:
    """The key of a kernel on the GPU that ``target`` describes, with the versions at hand."""
    device = f"{target.device}, {target.name}, {target.sms} SMs"
    return TuningKey(pattern, kernel, shape, density, device, _version("torch"), _version("triton", "pytorch-triton"))


@functools.cache
def _version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def density_class(share: float, row_width: float) -> str:
    """A bin for calls that the same config suits: allowed ``share`` of all pairs and mean keys a query, both in powers of four.

    >>> density_class(share=0.5, row_width=4096), density_class(0.06, 1000), density_class(0.0, 0.0)
    ('share 1/1, width 4096', 'share 1/16, width 1024', 'share 1/1024, width 16')
    """
    part = min(5, round(-math.log(max(share, 1e-9), 4) - 0.01))
    width = min(8, max(2, round(math.log(max(row_width, 1.0), 4) - 0.01)))
    return f"share 1/{4 ** max(0, part)}, width {4**width}"


@dataclass(frozen=True)
class Record(Reported):
    """The result of one tuning: the fastest config and its seconds, those of the default (None if it did not run), when (UTC), how many
    candidates were tried, and how many of those could not be used."""

    config: Config
    seconds: float
    default_seconds: float | None
    measured: str
    tried: int
    unusable: int

    def to_json(self) -> dict[str, Any]:
        """JSON data from which :meth:`from_json` makes an equal record."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Record:
        """The record out of :meth:`to_json`; ValueError says what is wrong with it.

        >>> Record.from_json({"config": None})
        Traceback (most recent call last):
            ...
        ValueError: wanted the fields ['config', 'default_seconds', 'measured', 'seconds', 'tried', 'unusable']
        """
        names = sorted(field.name for field in fields(Record))
        if not isinstance(data, dict) or sorted(data) != names:
            raise ValueError(f"wanted the fields {names}")
        for name in ("seconds", "default_seconds"):
            value = data[name]
            ok = isinstance(value, float) and math.isfinite(value) and value > 0
            if not ok and not (name == "default_seconds" and value is None):
                raise ValueError(f"{name}: got {value!r}, wanted a number above 0")
        for name in ("tried", "unusable"):
            if type(data[name]) is not int or data[name] < 0:
                raise ValueError(f"{name}: got {data[name]!r}, wanted a whole number")
        try:
            datetime.fromisoformat(data["measured"])
        except (TypeError, ValueError):
            raise ValueError(f"measured: got {data['measured']!r}, wanted a date") from None
        return Record(**(data | {"config": Config.from_json(data["config"])}))


def _store() -> Store:
    return Store(settings().cache / "tuning")


def recall(key: TuningKey, refuse: Callable[[Config], str | None]) -> Record | None:
    """The record of ``key``, if there is one that can be used; ``refuse`` says why a config cannot be launched, or None."""
    store, data = _store(), key.to_json()
    value = store.get(data)
    if value is None:
        return None
    try:
        record = Record.from_json(value)
        if problem := refuse(record.config):
            raise ValueError(problem)
    except ValueError as error:
        _note(
            store.path(data), f"does not hold a config that can be launched ({error}): ignored, and replaced when it is measured"
        )
        return None
    return record


def remember(key: TuningKey, record: Record) -> bool:
    """Put ``record`` in the store; True if it is on the disk, False if it is kept for this process only. Never an error of the disk."""
    return _store().put(key.to_json(), record.to_json())


def records() -> list[tuple[dict[str, Any], Record]]:
    """Every whole record in the store with its key as data, those of other devices and versions too."""
    found = []
    for key, value in _store().items():
        if key.get("kind") == KIND:
            with contextlib.suppress(ValueError):
                found.append((key, Record.from_json(value)))
    return found


def clear() -> int:
    """Delete every record of a kernel, whole or not; the number of files. The machine's calibration stays. OSError if that fails."""
    folder = settings().cache / "tuning"
    paths = [path for path in folder.glob(f"{KIND.replace(' ', '-')}-*.json") if path.is_file()]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def export(path: Path | str) -> int:
    """Write every record of a kernel to one JSON file, whole or not at all; the number of records. OSError if it cannot be written."""
    path, found = Path(path), [{"key": key, "value": record.to_json()} for key, record in records()]
    content = json.dumps({"what": "sparsedsl tuning results", "format": FILE_FORMAT, "records": found}, indent=1)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(content + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return len(found)


@dataclass(frozen=True)
class Imported(Reported):
    """``taken`` records are now in the store; ``older``: ours were measured later and stay; ``refused``: why, one line a record."""

    taken: int
    older: int
    refused: tuple[str, ...]

    def __str__(self) -> str:
        words = f"{self.taken} taken, {self.older} older than ours, {len(self.refused)} refused"
        return "\n".join([words, *(f"  {reason}" for reason in self.refused)])


def import_(path: Path | str, *, replace: bool = False) -> Imported:
    """Put the records of an exported file into the store; ``replace``: also where ours were measured later.

    Each record is checked for itself, and what it says is checked again before it is launched, so a file from another machine does no
    harm. Raises OSError if the file cannot be read, SparseDSLError if it is no such file, or one of a later release.
    """
    taken, older, refused = 0, 0, []
    ours = {_text(key): record for key, record in records()}
    for number, entry in enumerate(_entries(Path(path))):
        try:
            key, record = _checked(entry)
        except ValueError as error:
            refused.append(f"record {number}: {error}")
            continue
        mine = ours.get(_text(key))
        if mine is not None and not replace and mine.measured >= record.measured:
            older += 1
        elif _store().put(key, record.to_json()):
            taken += 1
        else:
            refused.append(f"record {number}: the store cannot be written")
    return Imported(taken, older, tuple(refused))


def _entries(path: Path) -> list[Any]:
    wanted = "wanted a file written by `python -m sparsedsl tune --export FILE`"
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise SparseDSLError(f"{path} is no JSON; {wanted}") from None
    if not isinstance(data, dict) or type(data.get("format")) is not int or not isinstance(data.get("records"), list):
        raise SparseDSLError(f"{path} holds no tuning results; {wanted}")
    if data["format"] > FILE_FORMAT:
        raise SparseDSLError(f"{path} was written by a newer sparsedsl (format {data['format']}, ours is {FILE_FORMAT}): upgrade")
    return data["records"]


def _checked(entry: Any) -> tuple[dict[str, Any], Record]:
    """Key and record of one entry of a file; ValueError if they are not what this release writes."""
    if not isinstance(entry, dict) or sorted(entry) != ["key", "value"] or not isinstance(entry["key"], dict):
        raise ValueError("no record with a key and a value")
    key = entry["key"]
    if key.get("kind") != KIND or key.get("method") != METHOD:
        raise ValueError(f"kind {key.get('kind')!r} and method {key.get('method')!r}, wanted {KIND!r} and {METHOD}")
    names = {"kind", "method", *(field.name for field in fields(TuningKey))}
    shape = key.get("shape")
    if {*key} != names or not isinstance(shape, dict) or {*shape} != {field.name for field in fields(Shape)}:
        raise ValueError("a key with other fields")
    return key, Record.from_json(entry["value"])


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _note(path: Path, what: str) -> None:
    """Log once a process about each file."""
    if path not in _noted:
        _noted.add(path)
        logger.warning("%s %s", path, what)
