"""What the papers of the systems claim, beside what was measured here. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import measure
from measure import length_text

__all__ = ["CLAIMS", "Claim", "claims_text"]


@dataclass(frozen=True)
class Claim:
    """A headline figure and its hardware; ``of``: the system and the kind of number that stands beside it here (:func:`claims_text`)."""

    system: str
    what: str
    figure: str
    hardware: str
    of: tuple[str, str]


CLAIMS = (
    Claim(
        "TSA", "choosing and moving, of attention time, 128K", "below 11 %", "A100, with FlashAttention-2", ("tsa", "overhead")
    ),
    Claim("TSA", "attention, speed-up over dense at 128K", "up to 3.23 x", "A100, inside a sparse kernel", ("tsa_pbs", "speed")),
    Claim("TSA", "the same with dense attention inside", "1.36 x", "A100, FlashAttention-2", ("tsa", "speed")),
    Claim("PBS", "attention, speed-up over dense at 128K", "2.77 x", "H100, FlashAttention-2", ("pbs", "speed")),
    Claim("PBS", "the same at 512K", "3.41 x", "H100, FlashAttention-2", ("pbs", "speed")),
    Claim("NHA", "time by length", "near-linear", "GPU not said", ("nha", "growth")),
    Claim("HSA", "time by length, beside FlashAttention-3", "faster at long lengths only", "H800", ("hsa", "growth")),
    Claim("Ring", "prefill, speed-up over dense at 128K (model)", "about 8 x", "GPU not said", ("ring", "speed")),
)


def claims_text(records: Sequence[Mapping[str, Any]]) -> str:
    """What the papers say beside what was measured here, at the longest length. Other machines, other models: not the same question."""
    rows = []
    for claim in CLAIMS:
        system, kind = claim.of
        own = sorted((record for record in records if record["system"] == system), key=lambda record: record["length"])
        rows.append([f"{claim.system}: {claim.what}", claim.figure, claim.hardware, _here(kind, own)])
    return measure.markdown(["paper", "figure", "hardware", "here, this machine"], rows)


def _here(kind: str, own: Sequence[Mapping[str, Any]]) -> str:
    if not own:
        return "not measured"
    last = own[-1]
    at = f"at {length_text(last['length'])}"
    if kind == "overhead":
        parts = last["parts"]
        return f"{(parts['choosing'] + parts['moving']) / sum(parts.values()):.1%} {at}"
    if kind == "speed":
        words = "" if last["density"] is None else f", density {last['density']:.2f}"
        return f"{last['sdpa_over_ours']:.2f} x {at}{words}"
    if len(own) < 2:
        return "one length only"
    before = own[-2]
    growth = {
        name: math.log(last["seconds"][name] / before["seconds"][name]) / math.log(last["length"] / before["length"])
        for name in ("ours", "sdpa")
    }
    ends = f"{length_text(before['length'])} to {length_text(last['length'])}"
    return (
        f"length to the power {growth['ours']:.2f} from {ends}, dense {growth['sdpa']:.2f}; {last['sdpa_over_ours']:.2f} x {at}"
    )
