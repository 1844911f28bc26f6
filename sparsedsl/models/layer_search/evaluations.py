"""What was judged already: in memory, and in a file that a search that was broken off goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError
from sparsedsl.models.layer_search.candidates import Assignment, Candidate
from sparsedsl.models.layer_search.judging import Judge, Measured, Sums
from sparsedsl.models.layers import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Evaluations", "fingerprint", "write_atomically"]

FORMAT = "sparsedsl search evaluations 1"
SAMPLE = 64  # numbers of each weight that the fingerprint reads


class Evaluations:
    """Assignments and their :class:`Sums`, row by row; ``path``: the file they are kept in, or None.

    The file is read if it exists, and replaced after every row of every assignment: whatever ends the process, it is whole. Bound, cost and
    layers are no part of what it stands for, so that a search with others goes on from it too, and so do more candidates.

    Raises :class:`~sparsedsl.PatternError` where the file is none of ours, or was made with another model, text or meaning of a name.
    """

    def __init__(self, judge: Judge, stamp: Mapping[str, Any], path: str | os.PathLike[str] | None) -> None:
        self.judge, self.path = judge, None if path is None else Path(path)
        self._stamp = {**stamp, "candidates": dict(stamp["candidates"])}
        self._sums: dict[Assignment, dict[int, Sums]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def missing(self, assignments: Sequence[Assignment]) -> int:
        """How many rows of these are yet to be judged."""
        rows = len(self.judge.rows)
        return sum(rows - len(self._sums.get(assignment, ())) for assignment in dict.fromkeys(assignments))

    def measured(self, assignments: Sequence[Assignment], step: Callable[[], None]) -> list[Measured]:
        """Judge what is missing of these, calling ``step`` after each row of each, and give the means of all."""
        for number in range(len(self.judge.rows)):
            missing = [one for one in dict.fromkeys(assignments) if number not in self._sums.get(one, ())]
            if missing:
                for assignment, sums in zip(missing, self.judge.row(number, missing), strict=True):
                    self._sums.setdefault(assignment, {})[number] = sums
                    self._write()
                    step()
        return [Measured.of(self._sums[assignment].values()) for assignment in assignments]

    def _write(self) -> None:
        if self.path is not None:
            found = [
                {"assignment": assignment, "rows": {number: sums.numbers() for number, sums in sorted(rows.items())}}
                for assignment, rows in self._sums.items()
            ]
            write_atomically(self.path, json.dumps({"format": FORMAT, "made_with": self._stamp, "evaluations": found}))

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PatternError(
                f"search(): resume={str(path)!r} cannot be read: {error}; name a file that does not exist yet"
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PatternError(
                f"search(): resume={str(path)!r} is no file of search evaluations; name one that does not exist yet"
            )
        try:
            self._take(data, str(path))
        except (AttributeError, KeyError, TypeError) as error:
            raise PatternError(
                f"search(): resume={str(path)!r} is damaged ({type(error).__name__}: {error}); name a file that does not exist yet"
            ) from None

    def _take(self, data: Mapping[str, Any], path: str) -> None:
        """What a file holds, unless it stands for something else."""
        theirs, other = data["made_with"], []
        other += [what for what in ("model", "weights", "text") if theirs[what] != self._stamp[what]]
        known = self._stamp["candidates"]
        other += [f"candidate {name!r}" for name, key in theirs["candidates"].items() if known.get(name, key) != key]
        if other:
            raise PatternError(
                f"search(): resume={path!r} was made with another {', another '.join(other)}; name a file that does not exist yet, or "
                "search with what it was made with"
            )
        self._stamp["candidates"] = theirs["candidates"] | known
        for entry in data["evaluations"]:
            assignment = tuple((int(layer), str(name)) for layer, name in entry["assignment"])
            self._sums[assignment] = {int(number): Sums(*numbers) for number, numbers in entry["rows"].items()}


def fingerprint(
    model: PreTrainedModel, rows: torch.Tensor, positions: Sequence[torch.Tensor], candidates: Mapping[str, Candidate]
) -> dict[str, Any]:
    """What sums depend on, part by part: configuration, a sample of every weight, text with judged positions, candidates by name."""
    config = text_config(model).to_dict()
    plain = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    weights, text = hashlib.sha256(), hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].double().cpu()
        weights.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    for part in (rows, *positions):
        text.update(str(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
    kind = hashlib.sha256(json.dumps([type(model).__name__, plain], sort_keys=True, default=str).encode())
    return {
        "model": kind.hexdigest()[:32],
        "weights": weights.hexdigest()[:32],
        "text": text.hexdigest()[:32],
        "candidates": {name: candidate.fingerprint for name, candidate in candidates.items()},
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
