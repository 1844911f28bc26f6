"""Values that outlive the process: one JSON file a record, in a folder that many processes may use at once.

A record appears whole or not at all: it is written beside its place, flushed to the disk, and renamed. So nobody needs a lock, a killed
process leaves at most a temporary file, and of two processes that write one key the later wins. Reading and writing never fail: what
cannot be read counts as absent, what cannot be written is kept in memory, and each is logged once, as a warning of "sparsedsl".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "Store"]

# Raised when the layout of a record changes: older releases then leave the new records alone.
FORMAT = 1

_NEWER = "was written by a newer sparsedsl: left alone; a value of ours is kept for this process only"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 3600

logger = logging.getLogger("sparsedsl")

# All per process, and by folder, so that every Store of one folder shows the same.
_kept: dict[Path, dict[str, str]] = {}  # what could not be written: key -> value, both as text
_cleaned: set[Path] = set()
_noted: set[Path] = set()


class _NewerFormatError(Exception):
    """The record was written by a later release, which may know more than we do."""


class Store:
    """Keys and values of JSON data below ``folder``, which is made when the first value is written.

    A key is a mapping; its entry ``"kind"``, if there is one, becomes the readable part of the file's name. Keys are equal if they
    are the same JSON. Values come back as JSON gives them: tuples as lists, keys of dictionaries as text.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Store(folder).put({"kind": "tile", "rows": 512}, {"block": 64, "took_us": 812.5})
    True
    >>> Store(folder).get({"rows": 512, "kind": "tile"})
    {'block': 64, 'took_us': 812.5}
    >>> Store(folder).get({"kind": "tile", "rows": 1024}) is None
    True
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file that holds the record of ``key``, whether or not it exists.

        >>> Store(Path("/cache")).path({"kind": "Tile sizes", "rows": 512}).name
        'tile-sizes-e94da04db2a0a40abf25539e2267ddb8.json'
        """
        text = _canonical(dict(key))
        kind = re.sub(r"[^a-z0-9]+", "-", str(json.loads(text).get("kind", "")).lower()).strip("-")[:32] or "record"
        return self.folder / f"{kind}-{_digest(text)}.json"

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The value last put under ``key``, a copy of one's own; None if there is none that can be used.

        ``TypeError`` or ``ValueError`` if the key is not JSON data; never an error of the disk.
        """
        text = _canonical(dict(key))
        if (kept := _kept.get(self.folder, {}).get(text)) is not None:
            return json.loads(kept)
        record = self._read(self.path(key))
        return record["value"] if record and _canonical(record["key"]) == text else None

    def put(self, key: Mapping[str, Any], value: object) -> bool:
        """Remember ``value`` under ``key``; True if it is on the disk, False if it is kept for this process only.

        ``TypeError`` or ``ValueError`` if key or value are not JSON data; never an error of the disk. A record that a later release
        wrote is not replaced.
        """
        text, path = _canonical(dict(key)), self.path(key)
        record = {"key": json.loads(text), "value": json.loads(_canonical(value)), "format": FORMAT, "written": _now()}
        record["sha256"] = _digest(_canonical(record))
        try:
            self._write(path, json.dumps(record, indent=1).encode())
        except _NewerFormatError:
            _note(path, _NEWER)
        except OSError as error:
            _note(
                self.folder,
                f"cannot be written ({error}): values are kept for this process only; set SPARSEDSL_CACHE to another folder",
            )
        else:
            _kept.get(self.folder, {}).pop(text, None)
            return True
        _kept.setdefault(self.folder, {})[text] = _canonical(value)
        return False

    def items(self) -> list[tuple[dict[str, Any], Any]]:
        """Every key and value that ``get`` would give, ordered by file name; those kept in memory last.

        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()))
        >>> store.put({"kind": "tile", "rows": 512}, 64)
        True
        >>> store.items()
        [({'kind': 'tile', 'rows': 512}, 64)]
        """
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(".json"))
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            _note(self.folder, f"cannot be read ({error}): treated as empty")
            names = []
        kept = dict(_kept.get(self.folder, {}))
        records = [
            record for name in names if (record := self._read(self.folder / name)) and _canonical(record["key"]) not in kept
        ]
        return [(one["key"], one["value"]) for one in records] + [(json.loads(key), json.loads(kept[key])) for key in kept]

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The record in a file; None, and a note, if the file is there but is no record that belongs there."""
        try:
            record = _parsed(path.read_bytes())
            if self.path(record["key"]) != path:
                raise ValueError("the record of another key")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _NewerFormatError:
            _note(path, _NEWER)
        except OSError as error:
            _note(path, f"cannot be read ({error}): ignored")
        except (ValueError, RecursionError) as error:
            _note(path, f"is damaged or not ours ({error}): ignored, and replaced when its value is next remembered")
        else:
            return record
        return None

    def _write(self, path: Path, content: bytes) -> None:
        """Put a whole file in its place; OSError if that is not possible, and then the place is as it was."""
        self._clean()
        try:
            self._replace(path, content)
        except FileNotFoundError:
            # Somebody deleted the folder, or our temporary file, in between; the cache may be deleted at any time.
            self._replace(path, content)

    def _replace(self, path: Path, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        # Not tempfile: its files are for the owner alone, whatever the umask says about a cache that a group shares.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _refuse_newer(path)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _flush_folder(self.folder)

    def _clean(self) -> None:
        """Remove what killed processes left, once a process; a young temporary file may be somebody's work."""
        if self.folder in _cleaned:
            return
        _cleaned.add(self.folder)
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{_TEMPORARY}*"):
                with contextlib.suppress(OSError):
                    if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                        path.unlink()


def _parsed(content: bytes) -> dict[str, Any]:
    """A record out of a file's content; ValueError says what is wrong with it."""
    try:
        record = json.loads(content.decode())
    except ValueError:
        raise ValueError("no JSON") from None
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        raise ValueError("JSON, but no record")
    if record["format"] > FORMAT:
        raise _NewerFormatError
    if {*record} != {"key", "value", "format", "written", "sha256"} or not isinstance(record["key"], dict):
        raise ValueError("a record with other fields")
    # The digest also finds what is still JSON: a digit that changed, text that was edited.
    if record.pop("sha256") != _digest(_canonical(record)):
        raise ValueError("its content does not fit its checksum")
    return record


def _refuse_newer(path: Path) -> None:
    """_NewerFormatError if a later release wrote this file; silence about everything else that may be wrong with it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        _parsed(path.read_bytes())


def _canonical(value: object) -> str:
    """One text for equal JSON data. Sorting also refuses keys that differ, but would be the same text: 1 and "1"."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _flush_folder(folder: Path) -> None:
    """Let the rename survive a power cut; a file system that cannot do this has still renamed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _note(path: Path, what: str) -> None:
    """Log once a process about each path: what is wrong with it, and what was done."""
    if path not in _noted:
        _noted.add(path)
        logger.warning("%s %s", path, what)
