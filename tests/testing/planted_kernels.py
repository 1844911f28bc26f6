"""The kernels with one planted fault each, and those without: what is planted, what it claims, and how small a case shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sparsedsl as sd
from sparsedsl.testing import Kernel
from tests.testing.planted_others import Backward, Remembering, Split
from tests.testing.planted_tiled import Tiled

CAUSAL = sd.kv_idx <= sd.q_idx
FULL = sd.kv_idx >= 0
WINDOW = CAUSAL & (sd.q_idx - sd.kv_idx < 3)
PADDED = CAUSAL & (sd.kv_idx >= sd.table("start", values_in=(0, 3))[sd.b])
SLOPED = sd.attend(CAUSAL, score=sd.score - sd.table("slope", dtype=float)[sd.h] * (sd.q_idx - sd.kv_idx))
FACTORED = sd.attend(CAUSAL, score=sd.score * sd.table("factor", dtype=float)[sd.h])
SINK = sd.attend(CAUSAL, sink=sd.table("sink", learned=True)[sd.h])
SOFTCAP = sd.attend(CAUSAL, score=sd.tanh(sd.score / 3) * 3)
BIAS = sd.attend(CAUSAL, score=sd.score + sd.table("bias", learned=True)[sd.h, sd.kv_idx])

TILES: dict[str, Any] = {"tiles": (4, 4, 4)}
LSE: dict[str, Any] = {"lse": True, **TILES}
MASKS = {"causal": CAUSAL, "full": FULL, "window": WINDOW, "padded": PADDED}


@dataclass(frozen=True)
class Planted:
    """A kernel with a fault: which property should find it first ("" for any), and how large its smallest case may be."""

    name: str
    kernel: Kernel
    size: int
    found_by: str = ""


def _size(batch: int = 1, heads: int = 1, q_len: int = 1, kv_len: int = 1, head_dim: int = 1, head_dim_v: int = 1) -> int:
    return batch * heads * (q_len + kv_len) * (head_dim + head_dim_v)


def _tiled(
    name: str,
    fault: str,
    mask: str = "causal",
    found_by: str = "",
    implements: Any = None,
    lse: bool = False,
    size: Any = None,
    **claims: Any,
) -> Planted:
    of = MASKS[mask] if implements is None else implements
    kernel = Kernel(Tiled(mask, fault, lse), implements=of, lse=lse, offset=True, scale=True, **TILES, **claims)
    return Planted(name, kernel, _size(**(size or {})), found_by)


def _split(name: str, fault: str, found_by: str = "", mask: str = "causal", size: Any = None, **claims: Any) -> Planted:
    return Planted(name, Kernel(Split(fault, mask), implements=MASKS[mask], **LSE, **claims), _size(**(size or {})), found_by)


def _backward(name: str, fault: str, implements: Any = CAUSAL, kind: str = "", size: Any = None) -> Planted:
    kernel = Kernel(Backward(fault, kind), implements=implements, grad="all", **LSE)
    return Planted(name, kernel, _size(**(size or {})), "GRAD")


def planted() -> list[Planted]:
    """All of them, with nothing remembered of calls before."""
    return [
        _tiled("T01", "kv tail not masked", "full"),
        _tiled("T02", "tail dropped", "full", size={"kv_len": 5}),
        _tiled("T03", "last rows unwritten", size={"q_len": 5}),
        _tiled("T04", "diagonal by its first row", size={"q_len": 2, "kv_len": 4}),
        _tiled("T05", "own key missing"),
        _tiled("T06", "offset ignored", size={"kv_len": 2}),
        _tiled("T07", "window + 1", "window", size={"kv_len": 3}),
        _tiled("T08", "window start rounded up", "window", size={"kv_len": 4}),
        _tiled("T09", "h % Hk", size={"heads": 4}),
        _tiled("T10", "min(h, Hk - 1)", size={"heads": 4}),
        _tiled("T11", "acc not rescaled", "full", size={"q_len": 2, "kv_len": 6}),
        _tiled("T12", "l not rescaled", "full", size={"q_len": 2, "kv_len": 6}),
        _tiled("T13", "no maximum"),
        _tiled("T14", "max floored at 0", "window", size={"q_len": 4, "kv_len": 5}),
        _tiled("T15", "sentinel of -1e4", size={"q_len": 1, "kv_len": 2}),
        _tiled("T16", "empty row is NaN", size={"q_len": 2}),
        _tiled("T17", "empty row is the mean", size={"q_len": 2}),
        _tiled("T18", "LSE in base 2", lse=True, found_by="LSE"),
        _tiled("T19", "LSE without the maximum", lse=True, found_by="LSE"),
        _tiled("T20", "LSE without the sink", implements=SINK, lse=True, found_by="LSE"),
        _tiled("T21", "sink scaled", implements=SINK, size={"head_dim": 2}),
        _tiled("T22", "masked v multiplied", found_by="POIS", poison=True, size={"q_len": 2, "kv_len": 2}),
        _tiled("T23", "v tail"),
        _tiled("T24", "lanes past D", size={"head_dim": 3}),
        _tiled("T25", "Dv taken for D", size={"head_dim_v": 2}),
        _tiled("T26", "scale from Dv", size={"kv_len": 2, "head_dim_v": 2}),
        _tiled("T27", "scale from padded D", size={"kv_len": 2, "head_dim": 3}),
        _tiled("T28", "packed strides", size={"heads": 2, "kv_len": 2}),
        _tiled("T29", "offsets of 11 bits", size={"kv_len": 600, "head_dim": 4}),
        _tiled("T30", "acc in bfloat16", size={"kv_len": 1100}),
        _tiled("T31", "l in bfloat16", size={"kv_len": 64}),
        _tiled("T32", "k_scale ignored", implements=FACTORED, size={"kv_len": 2}),
        _tiled("T33", "k_scale of head 0", implements=FACTORED, size={"heads": 2, "kv_len": 2}),
        _tiled("T34", "ALiBi from the row number", implements=SLOPED, lse=True, found_by="LSE"),
        _tiled("T35", "left padding of entry 0", "padded", size={"batch": 2}),
        Planted("T36", Kernel(Remembering(), implements=CAUSAL, **TILES), _size(kv_len=2), "STATE"),
        _tiled("T37", "q scaled in place", found_by="PURE", size={"head_dim": 2}),
        _tiled("T38", "order by call", "full", found_by="REPEAT", size={"q_len": 2, "kv_len": 6}),
        _tiled("T39", "every fifth call loses a tile", found_by="REPEAT"),
        _split("T40", "merged in base 2", size={"kv_len": 2}),
        _split("T41", "unweighted", size={"kv_len": 2}),
        _split("T42", "NaN where all parts are empty", size={"q_len": 2}),
        _split("T43", "old LSE"),
        _split("T44", "part start rounded down", "LSE", mask="window", size={"kv_len": 2}),
        _split("T45", "parts from the batch", found_by="BATCH", batch_invariant=True, size={"batch": 2, "q_len": 2, "kv_len": 3}),
        _backward("T46", "softcap slope missing", SOFTCAP, "softcap", size={"kv_len": 2}),
        _backward("T47", "sink gradient missing", SINK, "sink"),
        _backward("T48", "bias of one entry", BIAS, "bias", size={"batch": 2, "kv_len": 2}),
        _backward("T49", "dk of one head", size={"heads": 2, "kv_len": 2}),
        _backward("T50", "Delta missing", size={"kv_len": 2}),
        _backward("T51", "dLSE ignored"),
        _backward("T52", "dq unscaled", size={"head_dim": 2, "kv_len": 2}),
        _backward("T53", "backward mask is top-left", size={"kv_len": 2}),
    ]


def right() -> dict[str, Kernel]:
    """Kernels without a fault, of every kind that faults are planted in."""
    tiled = {
        f"tiled {name}": Kernel(Tiled(name, "", True), implements=of, lse=True, poison=True, offset=True, scale=True, **TILES)
        for name, of in MASKS.items()
    }
    kinds = {"softcap": SOFTCAP, "sink": SINK, "bias": BIAS}
    return tiled | {
        "tiled slopes": Kernel(Tiled("causal", "", True), implements=SLOPED, offset=True, scale=True, **LSE),
        "tiled factors": Kernel(Tiled("causal", "", True), implements=FACTORED, offset=True, scale=True, **LSE),
        "tiled sinks": Kernel(Tiled("causal", "", True), implements=SINK, offset=True, scale=True, **LSE),
        "split": Kernel(Split(), implements=CAUSAL, **LSE),
        "remembering": Kernel(Remembering(""), implements=CAUSAL, **TILES),
        "backward": Kernel(Backward(), implements=CAUSAL, grad="all", **LSE),
        **{f"backward {kind}": Kernel(Backward("", kind), implements=of, grad="all", **LSE) for kind, of in kinds.items()},
    }
