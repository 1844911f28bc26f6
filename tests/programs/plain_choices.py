"""What a text form's words for choices, orders and subsets mean: lists of numbers, sorted; see :mod:`tests.programs.plain_programs`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.programs.plain_grid import Grid, lifted
from tests.programs.plain_scores import NEVER, Part, PlainCall, held, wide

__all__ = ["CHOICES"]

Tensor = torch.Tensor


def _best_first(line: list[float], among: list[int]) -> list[int]:
    return sorted(among, key=lambda n: (-line[n], n))


def _portions(line: list[float], among: list[int], mass: bool) -> dict[int, float]:
    """What each candidate holds of all of them."""
    peak = max((line[n] for n in among), default=0.0)
    parts = {n: line[n] if mass else math.exp(line[n] - peak) for n in among}
    total = math.fsum(parts.values()) or 1.0
    return {n: part / total for n, part in parts.items()}


def _holding(order: list[int], part: dict[int, float], share: float, inclusive: bool) -> tuple[list[int], bool]:
    """The first of an order that hold a share, and whether that was reached."""
    sums = 0.0
    for count, n in enumerate(order, 1):
        sums += part[n]
        if sums >= share:
            return order[: count if inclusive else count - 1], True
    return order, False


Chooser = Callable[[list[float], list[int], list[int]], Any]


def _chosen(scores: Part, among: Any, forced: Any, choose: Chooser, name: str = "") -> Part:
    """A choice, row by row: ``choose(scores, candidates, forced ones)`` gives block numbers."""

    def make(call: PlainCall) -> Tensor:
        x = scores.at(call).detach()
        allowed = x > NEVER
        if among is not None:
            allowed = allowed & held(among, call, scores, x.shape[1], x.shape[3])
        first = torch.zeros_like(allowed) if forced is None else allowed & held(forced, call, scores, x.shape[1], x.shape[3])
        found = torch.zeros_like(allowed)
        for place in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
            at = tuple(place)
            found[at][choose(x[at].tolist(), allowed[at].nonzero()[:, 0].tolist(), first[at].nonzero()[:, 0].tolist())] = True
        return found

    return Part(make, scores.rows, scores.columns)


def _top_k(scores: Part, count: int, among: Any = None, forced: Any = None, extra: bool = False, name: str = "") -> Part:
    def choose(line: list[float], candidates: list[int], first: list[int]) -> list[int]:
        rest = [n for n in _best_first(line, candidates) if n not in first]
        return first + rest[:count] if extra else (first + rest)[:count]

    return _chosen(scores, among, forced, choose)


def _top_p(
    scores: Part, share: float, among: Any = None, forced: Any = None, inclusive: bool = True, unmet: str = "all",
    forced_in_mass: bool = False, over: str = "row", name: str = "",
) -> Part:  # fmt: skip
    def choose(line: list[float], candidates: list[int], first: list[int]) -> list[int]:
        if share == 1:
            return candidates
        part = _portions(line, candidates, scores.mass)
        order = _best_first([part.get(n, NEVER) for n in range(len(line))], candidates)
        if forced_in_mass:
            order = first + [n for n in order if n not in first]
        taken, reached = _holding(order, part, share, inclusive)
        return first + (taken if reached or unmet == "all" else [])

    made = _chosen(scores, among, forced, choose)
    if over == "row" or share == 1:
        return made

    def of_map(call: PlainCall) -> Tensor:
        """The greatest parts of all rows of a head together."""
        everyone = _chosen(scores, among, None, lambda line, candidates, first: candidates).at(call)
        always = everyone & _chosen(scores, among, forced, lambda line, candidates, first: first).at(call)
        x, found = scores.at(call).detach(), torch.zeros_like(everyone)
        for b, n in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
            parts: dict[tuple[int, int], float] = {}
            for u in range(x.shape[2]):
                row = everyone[b, n, u].nonzero()[:, 0].tolist()
                parts |= {(u, c): part for c, part in _portions(x[b, n, u].tolist(), row, scores.mass).items()}
            total, sums, taken, reached = math.fsum(parts.values()), 0.0, [], False
            for cell in sorted(parts, key=lambda cell: (-parts[cell], cell)):
                sums += parts[cell]
                reached = sums >= share * total
                taken += [cell] if inclusive or not reached else []
                if reached:
                    break
            for cell in taken if reached or unmet == "all" else []:
                found[b, n][cell] = True
        return found | always

    return Part(of_map, scores.rows, scores.columns)


def _threshold(scores: Part, least: float, among: Any = None, forced: Any = None, name: str = "") -> Part:
    def choose(line: list[float], candidates: list[int], first: list[int]) -> list[int]:
        height = _portions(line, candidates, True) if scores.mass else line
        return first + [n for n in candidates if height[n] >= least]

    return _chosen(scores, among, forced, choose)


def _given(x: Part, unit: int, name: str = "") -> Part:
    def make(call: PlainCall) -> Tensor:
        numbers, blocks = x.at(call), -(-call.k.shape[2] // unit)
        if numbers.dtype == torch.bool:
            return torch.nn.functional.pad(numbers, (0, blocks - numbers.shape[3]))
        found = torch.zeros(*numbers.shape[:3], blocks + 1, dtype=torch.bool)
        return found.scatter(3, torch.where(numbers < 0, blocks, numbers), True)[..., :blocks]

    return Part(make, x.rows, unit)


def _keys_chosen(
    scores: Part, count: int | None = None, share: float | None = None, inclusive: bool = True, among: Any = None, forced: Any = None,
    name: str = "", block: int = 1,
) -> Part:  # fmt: skip
    distances = scores.distances

    def make(call: PlainCall) -> Tensor:
        x = scores.at(call).detach()
        heads, keys = x.shape[1:]

        def said(mask: Any, otherwise: bool) -> Tensor:
            """Of every key, or distance, for one of the query heads that share the scores."""
            if mask is None:
                return torch.full(x.shape, otherwise)
            numbers = torch.arange(keys)
            rows, columns = (numbers, torch.zeros(1, dtype=torch.int64)) if distances else (torch.zeros(1).long(), numbers)
            grid = _Lengths(call, rows, columns)
            pairs = grid.filled(lifted(mask).of(grid))
            return (pairs[..., 0] if distances else pairs[:, :, 0]).unflatten(1, (heads, -1)).any(2)

        allowed, first = said(among, True), said(forced, False)
        found = torch.zeros(*x.shape[:2], -(-keys // block), dtype=torch.bool)
        for b, n in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
            line, live = x[b, n].tolist(), allowed[b, n].nonzero()[:, 0].tolist()
            named = [m for m in live if first[b, n, m]]
            units, always = sorted({m // block for m in live}), sorted({m // block for m in named})
            sums = [math.fsum(line[m] for m in live if m // block == u) for u in range(found.shape[2])]
            ahead = always + [u for u in _best_first(sums, units) if u not in always]
            if count is not None:
                chosen = ahead[:count]
            elif share == 1:
                chosen = units
            else:
                taken, _ = _holding(_best_first(line, live), _portions(line, live, True), float(share or 0), inclusive)
                chosen = taken + always if block == 1 else ahead[: len(taken) // block + 1] + always
            found[b, n, chosen] = True
        return found

    return Part(make)


class _Lengths(Grid):
    """Keys alone, or distances alone: lengths are those of the call."""

    @property
    def names(self) -> dict[str, Tensor]:
        return super().names | {"kv_len": torch.tensor(self.call.k.shape[2])}


# ---- orders and subsets ----------------------------------------------------------------------------------------------------------


def _segment_sort(scores: Part, segment: int, descending: bool = True, name: str = "") -> Part:
    def make(call: PlainCall) -> Tensor:
        x = scores.at(call).detach()
        found = torch.arange(x.shape[2]).expand(x.shape).clone()
        for b, n in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
            line = x[b, n].tolist()
            for start in range(0, x.shape[2] - segment + 1, segment):
                places = range(start, start + segment)
                ordered = sorted(places, key=lambda m: (-line[m] if descending else line[m], m))
                found[b, n, start : start + segment] = torch.tensor(ordered)
        return found

    return Part(make)


def _inverse(order: Part) -> Part:
    def make(call: PlainCall) -> Tensor:
        places = order.at(call)
        return torch.zeros_like(places).scatter(2, places, torch.arange(places.shape[2]).expand(places.shape))

    return Part(make)


def _keep_tokens(
    scores: Part, by: Part, tail: float | None = None, cover: float | None = None, least: int = 0, always: int = 0
) -> Part:
    def make(call: PlainCall) -> list[Tensor]:
        found = []
        for x, mass in zip(scores.at(call).detach(), by.at(call).detach()[:, 0], strict=True):
            before = max(x.shape[1] - always, 0)
            parts = _portions(mass.tolist(), list(range(before)), True)
            if tail is not None:
                dropped, sums = 0, 0.0
                for part in sorted(parts.values()):
                    sums += part
                    if sums >= tail:
                        dropped += 1 if dropped else 0
                        break
                    dropped += 1
                count = before - dropped
            elif cover == 1:
                count = before
            else:
                taken, _ = _beyond(sorted(parts.values(), reverse=True), float(cover or 0))
                count = taken
            count = max(count, min(least, before))
            rows = [
                sorted(_best_first(line, list(range(before)))[:count]) + list(range(before, x.shape[1])) for line in x.tolist()
            ]
            found.append(wide(torch.tensor(rows, dtype=torch.int64).view(1, len(rows), -1), call.q.shape[1])[0])
        return found

    return Part(make)


def _beyond(parts: list[float], cover: float) -> tuple[int, float]:
    """How many until they hold more than a share."""
    sums = 0.0
    for count, part in enumerate(parts, 1):
        sums += part
        if sums > cover:
            return count, sums
    return len(parts), sums


CHOICES: dict[str, Callable[..., Part]] = {
    "top_k": _top_k,
    "top_p": _top_p,
    "threshold": _threshold,
    "given": _given,
    "keys_chosen": _keys_chosen,
    "segment_sort": _segment_sort,
    "inverse": _inverse,
    "keep_tokens": _keep_tokens,
}
