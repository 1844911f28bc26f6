"""How fast a machine is at what a tiled kernel is made of: plain numbers, for cost models. Nothing is measured here."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["BUILT_IN", "HEAD_DIM", "KEYS", "ROWS", "Machine"]

# The sizes of the products that the rates are for: (rows, HEAD_DIM) x (KEYS, HEAD_DIM)^T in fp32.
ROWS = (32, 64, 128, 256, 512, 1024)
KEYS = 1024
HEAD_DIM = 64


@dataclass(frozen=True)
class Machine:
    """Rates of one machine with one number of threads, fp32. A product of ``m x n x d`` counts ``2 m n d`` operations.

    ========================  ==================================================================================================
    ``name``                  the processor, the number of threads, torch's version
    ``source``                ``"built in"``, or ``"measured"`` and the date
    ``linear_gflops``         GFLOP/s of one product of ROWS[i] rows through torch's oneDNN operator; all 0.0 where it does not work
    ``matmul_gflops``         GFLOP/s of the same product through ``torch.mm``
    ``batched_gflops``        GFLOP/s of ``torch.bmm``: 16 products of ROWS[i] rows with 256 keys
    ``flash_gflops``          GFLOP/s of torch's own flash attention, forward: 2 heads, 1024 queries, 1024 keys
    ``softmax_ns``            ns an element, in place on (256, 1024): the maximum of a row, subtract it, ``exp2``, the sum of a row
    ``pass_ns``               ns an element of one pass in place: add another matrix of that size
    ``call_us``               us of a torch operator that has nothing to do
    ``gather_gbs``            GB/s, read and written, of ``index_select`` of rows of HEAD_DIM numbers
    ========================  ==================================================================================================

    >>> slower = replace(BUILT_IN, name="another", flash_gflops=40.0)
    >>> Machine.from_json(slower.to_json()) == slower
    True
    >>> slower.fingerprint() == BUILT_IN.fingerprint()
    False
    """

    name: str
    source: str
    linear_gflops: tuple[float, ...]
    matmul_gflops: tuple[float, ...]
    batched_gflops: tuple[float, ...]
    flash_gflops: float
    softmax_ns: float
    pass_ns: float
    call_us: float
    gather_gbs: float

    @property
    def has_linear(self) -> bool:
        """Whether the oneDNN operator can be used.

        >>> BUILT_IN.has_linear, BUILT_IN.without_linear().has_linear
        (True, False)
        """
        return any(self.linear_gflops)

    def without_linear(self) -> Machine:
        """The same machine where the oneDNN operator does not work."""
        return replace(self, linear_gflops=(0.0,) * len(ROWS))

    def fingerprint(self) -> str:
        """16 hex digits that are equal if all rates are: machines that look the same to a cost model.

        >>> replace(BUILT_IN, name="its twin").fingerprint() == BUILT_IN.fingerprint()
        True
        """
        rates = {name: value for name, value in asdict(self).items() if name not in ("name", "source")}
        return hashlib.sha256(json.dumps(rates, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """JSON data from which :meth:`from_json` makes an equal machine.

        >>> BUILT_IN.to_json()["flash_gflops"]
        170.0
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(data: Any) -> Machine:
        """The machine out of :meth:`to_json`; ValueError says which field is missing, surplus or impossible.

        >>> Machine.from_json(BUILT_IN.to_json() | {"call_us": -1})
        Traceback (most recent call last):
            ...
        ValueError: call_us: got -1, wanted a number above 0
        """
        names = [field.name for field in fields(Machine)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"got {got}, wanted the fields {sorted(names)}")
        return Machine(**{name: _checked(name, data[name]) for name in names})


def _checked(name: str, value: Any) -> Any:
    if name in ("name", "source"):
        if not isinstance(value, str):
            raise ValueError(f"{name}: got {value!r}, wanted text")
        return value
    if not name.endswith("_gflops") or name == "flash_gflops":
        if not _is_rate(value):
            raise ValueError(f"{name}: got {value!r}, wanted a number above 0")
        return float(value)
    if not isinstance(value, list) or len(value) != len(ROWS):
        raise ValueError(f"{name}: got {value!r}, wanted {len(ROWS)} numbers")
    if not all(map(_is_rate, value)) and not (name == "linear_gflops" and value == [0.0] * len(ROWS)):
        zeros = ", or 0.0 throughout" if name == "linear_gflops" else ""
        raise ValueError(f"{name}: got {value!r}, wanted numbers above 0{zeros}")
    return tuple(map(float, value))


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


# Two cores of a server of 2024 with AVX-512, rounded.
BUILT_IN = Machine(
    name="two cores with AVX-512",
    source="built in",
    linear_gflops=(110.0, 230.0, 290.0, 350.0, 405.0, 410.0),
    matmul_gflops=(120.0, 150.0, 170.0, 180.0, 190.0, 190.0),
    batched_gflops=(120.0, 150.0, 175.0, 175.0, 170.0, 170.0),
    flash_gflops=170.0,
    softmax_ns=0.18,
    pass_ns=0.04,
    call_us=3.0,
    gather_gbs=15.0,
)
