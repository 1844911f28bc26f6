"""Which backends there are, and which of them does a piece of work. A backend joins by its folder and one entry in ``BACKENDS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from sparsedsl.backends.cpp.backend import CPP
from sparsedsl.backends.flex.backend import FLEX
from sparsedsl.backends.protocol import Backend
from sparsedsl.backends.reference.backend import REFERENCE
from sparsedsl.backends.tiled.backend import TILED
from sparsedsl.backends.triton.backend import TRITON
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.advice import check_word
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.request import CallFacts, NotYet, Plan, Request

__all__ = ["AUTO", "BACKENDS", "check_backend", "check_runs", "choose", "named", "refusals"]

AUTO = "auto"
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, TILED, CPP, FLEX, TRITON)}
"""Name -> backend."""

# Of the backends that can (most preferred first), which was measured to be the fastest, and how that is known; None: nobody knows.
Fastest = Callable[[tuple[str, ...]], tuple[str, str] | None]


def named(name: str) -> Backend:
    """The backend of a name."""
    return BACKENDS[name]


def check_backend(name: object) -> str:
    """The name, if it is ``"auto"`` or that of a backend.

    Raises :class:`~sparsedsl.PatternError` with the valid ones.
    """
    return check_word("backend", name, (AUTO, *BACKENDS))


def refusals(requests: Sequence[Request], patience: Patience) -> dict[str, str]:
    """Name of each backend that cannot do all of the work, or not yet -> why not."""
    found = {}
    for name, backend in BACKENDS.items():
        why = _joined(backend.refusal_by_now(request, patience) for request in requests)
        if why is not None:
            found[name] = why
    return found


def choose(
    request: Request, backend: str = AUTO, *, fastest: Fastest | None = None, patience: Patience | None = None
) -> Plan:  # fmt: skip
    """Who does a piece of work, and why. ``patience``: of the call that it is a piece of, where there are others.

    Raises:
        UnsupportedError: the backend that was asked for cannot. Nothing is ever replaced by something else without being asked for.
    """
    if backend != AUTO:
        check_runs([request], backend, patience)
        return Plan(backend, "asked for")
    liked = [(other.preference(request), other) for other in BACKENDS.values()]
    ranked = [other for liking, other in sorted(liked, key=lambda entry: -entry[0]) if liking > 0]
    refused: list[str] = []
    patience = patience or Patience()
    for place, other in enumerate(ranked):
        why = other.refusal_by_now(request, patience)
        if why is not None:
            refused.append(why)
            continue
        if fastest is not None and place + 1 < len(ranked):
            can = (other.name, *(late.name for late in ranked[place + 1 :] if late.refusal(request) is None))
            known = fastest(can) if len(can) > 1 else None
            if known is not None:
                return Plan(*known)
        lasting = not any(isinstance(reason, NotYet) for reason in refused)
        return Plan(other.name, "; ".join([*refused, other.reason(request)]), lasting)
    raise UnsupportedError(f"no backend can run this call: {'; '.join(refused)}")


def check_runs(requests: Sequence[Request], backend: str, patience: Patience | None = None) -> None:
    """Whether a backend does all of the work of a call. ``patience``: where it only asks, nothing is built for the answer.

    Raises:
        UnsupportedError: it does not; the message names what does, or what to change, each tried on these very requests.
    """
    chosen = named(backend)
    asking = patience if patience is not None and patience.asks else None
    why = _refusal(chosen, requests) if asking is None else _joined(_lasting(chosen, request, asking) for request in requests)
    if why is not None:
        why = why.removesuffix(". Use backend='tiled'")  # the way out of a generator, of which all are listed here
        raise UnsupportedError(f"backend {backend!r} cannot run this call: {why}. {_ways_out(chosen, requests)}")


def _refusal(backend: Backend, requests: Iterable[Request]) -> str | None:
    """All that it refuses, each reason once."""
    return _joined(backend.refusal(request) for request in requests)


def _lasting(backend: Backend, request: Request, patience: Patience) -> str | None:
    """What it refuses for good: a call that asks for it by name waits for the rest."""
    why = backend.refusal_by_now(request, patience)
    return None if isinstance(why, NotYet) else why


def _joined(reasons: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(filter(None, reasons))) or None


_CHANGES: tuple[tuple[str, Callable[[CallFacts], CallFacts]], ...] = (
    ("cast to float32: q.float(), k.float(), v.float()", lambda facts: replace(facts, dtype="float32")),
    ("call it under torch.no_grad() for inference", lambda facts: replace(facts, grad=False)),
    ("leave return_lse=False", lambda facts: replace(facts, lse=False)),
)


def _ways_out(backend: Backend, requests: Sequence[Request]) -> str:
    """Other backends and small changes, as far as they would run."""
    ways = [
        f"backend={other.name!r} ({other.summary})"
        for other in sorted(BACKENDS.values(), key=lambda other: other.name == REFERENCE.name)  # dense only after all else
        if other is not backend and _refusal(other, requests) is None
    ]
    text = f"Use {' or '.join(ways)}"
    for words, change in _CHANGES:
        changed = [replace(request, facts=change(request.facts)) for request in requests]
        if changed != list(requests) and _refusal(backend, changed) is None:
            text += f"; or {words}"
    return text
