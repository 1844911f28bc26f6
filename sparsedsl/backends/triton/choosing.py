"""Choosing blocks on one Triton kernel: from rows and landmarks to lists. Here: which choices it makes, tiles, and the launch.

What it makes: the ``k`` best by dot products or bounds of pages, as they are or as shares of a softmax over the row, summed, averaged or
the greatest of a group of heads and of neighbouring landmarks; among candidates, and with forced blocks, that a few ranges a row say.
All else is chosen by torch; :mod:`sparsedsl.backends.triton.choice_forms` says why. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from sparsedsl.backends.triton.attention import missing
from sparsedsl.backends.triton.choice_forms import Form, LeftToTorch, check_sizes, form_of
from sparsedsl.backends.triton.config_choice import target_of
from sparsedsl.backends.triton.launching import ALIGN, in_tiles, is_aligned, on, strided, tiles_contiguous
from sparsedsl.backends.triton.scan_pass import filled, precision_of
from sparsedsl.gpu.estimates import family, warps_of
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.targets import Target
from sparsedsl.selection.candidates import Candidates, IntervalRule, PairRule, Within
from sparsedsl.selection.choosing import Rule
from sparsedsl.selection.composed_scores import BoundScores
from sparsedsl.selection.derived_scores import SoftmaxScores
from sparsedsl.selection.scores import DotScores, ScoreSource
from sparsedsl.selection.stable_topk import best
from sparsedsl.torch_private import transforms_active

__all__ = ["ChoiceTiles", "choice_tiles", "choose_blocks"]

Tensor = torch.Tensor
# Of a row; they are looked at one by one.
MOST_RANGES = 4
# Rows up to which programs share the blocks of a row, and blocks that a share is worth.
FEW_ROWS, SHARE = 16, 512


# ---- limits and ranges ---------------------------------------------------------------------------------------------------------------


# Of candidates and rules that calls share: what the kernel reads of them.
_LIMITS: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _placed(t: Tensor, device: torch.device) -> Tensor:
    """As the kernel reads it: int32, the last dimension without gaps, on its device."""
    return t.to(torch.int32).to(device, non_blocking=True).contiguous()


def _steps(name: str, t: Tensor) -> dict[str, Any]:
    """From one batch entry and head to the next; 0 where one serves all."""
    by = [0 if size == 1 else stride for size, stride in zip(t.shape[:2], t.stride()[:2], strict=True)]
    return {f"{name}_batch": by[0], f"{name}_head": by[1]}


def _limits(candidates: Candidates, device: torch.device, of: str = "") -> dict[str, Any]:
    """Arguments that say from where to where a row may choose; ``of``: what their names begin with."""
    known = _LIMITS.setdefault(candidates, {})
    if (device, of) not in known:
        values: dict[str, Any] = {}
        for name, limit in (("begin", candidates.begin), ("end", candidates.end)):
            values[f"{of}{name}".upper()] = limit is not None
            if limit is not None:
                limit = _placed(limit[(None,) * (3 - limit.ndim)], device)
                values |= {f"{of}{name}_ptr": limit, **_steps(f"{of}{name}", limit)}
        known[device, of] = values
    return known[device, of]


def _ranges(rule: PairRule | None, device: torch.device, names: tuple[str, str, str]) -> tuple[int, dict[str, Any]]:
    """How many ranges of blocks a row has, and the arguments ``names`` that say which; raises ``LeftToTorch``."""
    if rule is None:
        return 0, {}
    if not isinstance(rule, IntervalRule):
        raise LeftToTorch("candidates or forced blocks are no ranges of blocks")
    known = _LIMITS.setdefault(rule, {})
    if device not in known:
        known[device] = [_placed(t, device) for t in rule.blocks]
    first, last = known[device]
    if first.shape[3] > MOST_RANGES:
        raise LeftToTorch(f"a row has {first.shape[3]} ranges of blocks; the kernel looks at {MOST_RANGES}")
    return first.shape[3], {f"{names[0]}_ptr": first, f"{names[1]}_ptr": last, **_steps(names[2], first)}


# ---- launch --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceTiles:
    """``rows`` and ``columns`` (64, as many as a number has bits) of a tile, how it is launched, places of a list."""

    rows: int
    columns: int
    kept: int
    warps: int
    stages: int


def choice_tiles(dtype: torch.dtype, width: int, k: int, rows: int, bound: bool, target: Target) -> ChoiceTiles:
    """Tiles that spill nothing in loops of 16-bit types on the targets that are built for; chosen by compiling, not by the clock."""
    kept = max(2, 1 << (k - 1).bit_length())
    if interpreted():
        return ChoiceTiles(32, 64, kept, 4, 1)
    wide = filled(width) * dtype.itemsize > 256
    # The list, and of a bound both parts of the rows, are held in registers.
    most = 16 if rows <= FEW_ROWS else 32 if wide or bound else 64
    most = max(16, min(most, 2048 // kept))
    # On AMD two products that are added up are shared out by rows alone, and what is on its way is held in registers.
    if family(target) == "cdna":
        return ChoiceTiles(most, 64, kept, warps_of(most, target) if bound else 4, 1 if bound else 2)
    return ChoiceTiles(most, 64, kept, 4, 2 if wide else 3)


def choose_blocks(
    source: ScoreSource, candidates: Candidates, forced: PairRule | None, rule: Rule, rows: slice, start: int, width: int
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """See :data:`sparsedsl.selection.choosing.Choose`."""
    try:
        return _chosen(source, candidates, forced, rule, rows, start, width)
    except LeftToTorch:
        return None


def _chosen(
    source: ScoreSource, candidates: Candidates, forced: PairRule | None, rule: Rule, rows: slice, start: int, width: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    form, (batch, heads, every, blocks) = form_of(source), source.shape
    if rule.name != "top_k" or transforms_active() or rows != slice(0, every):
        raise LeftToTorch("another rule, some of the rows, or a call under torch.func")
    below: Any = source
    softmax: Candidates | None = None
    while not isinstance(below, DotScores | BoundScores):
        if isinstance(below, SoftmaxScores):
            if below.totals is not None or below.first != (0, 0) or below.candidates.allowed is not None:
                raise LeftToTorch("a softmax over candidates that are no range")
            softmax = below.candidates
        below = below.source
    q, high, low = (below.a, below.b, below.b) if isinstance(below, DotScores) else (below.q, below.high, below.low)
    check_sizes(str(q.dtype).removeprefix("torch."), q.shape[3], rule.k)
    lacks = missing(q.device.type)
    if lacks is not None or q.dtype != high.dtype or not below.scale > 0:
        raise LeftToTorch(lacks or "rows and landmarks of two types, or a scale that is not positive")
    if interpreted() and q.dtype == torch.bfloat16:  # Triton's interpreter multiplies its bits
        q, high, low = q.float(), high.float(), low.float()
    counted = torch.empty((batch, heads, every), dtype=torch.int32, device=q.device)
    if not counted.numel() or not blocks or not rule.k:
        lists = torch.full((*counted.shape, width), -1, dtype=torch.int32, device=q.device)
        return lists, counted.zero_(), None if not rule.scores else lists.new_full(lists.shape, -torch.inf, dtype=torch.float32)
    job = _Job(
        form, rule, tiles_contiguous(q.detach()), high.detach(), low.detach(), below.scale, (heads, every, blocks), width, start
    )
    return job.run(candidates, forced, softmax, counted)


@dataclass(frozen=True, eq=False)
class _Job:
    """One choice on the device. ``size``: heads, rows and blocks of what is chosen."""

    form: Form
    rule: Rule
    q: Tensor
    high: Tensor
    low: Tensor
    scale: float
    size: tuple[int, int, int]
    width: int
    start: int

    @functools.cached_property
    def tiles(self) -> ChoiceTiles:
        """How it is cut."""
        return choice_tiles(self.q.dtype, self.q.shape[3], self.rule.k, self.size[1], self.form.bound, target_of(self.q.device))

    def landmarks(self) -> tuple[Tensor, Tensor]:
        """Landmarks as the kernel reads them: places of a tile in 32 bits, both parts of a bound alike."""
        high, low, tiles = tiles_contiguous(self.high), tiles_contiguous(self.low), self.tiles
        if high.stride(2) * tiles.columns * self.form.size >= 1 << 31 or high.stride() != low.stride():
            high, low = high.contiguous(), low.contiguous()
        return high, low

    def run(
        self, candidates: Candidates, forced: PairRule | None, softmax: Candidates | None, counted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Lists, counts and scores of what was chosen."""
        values = self.values(candidates, forced, softmax, counted)
        heads, rows, blocks = self.size
        batch, extra = self.q.shape[0], values["EXTRA"]
        programs = batch * heads * in_tiles(rows, self.tiles.rows)
        target = target_of(self.q.device)
        shares = 1 if rows > FEW_ROWS or extra else max(1, min(in_tiles(blocks, SHARE), in_tiles(2 * target.sms, programs)))
        several, kept = shares > 1, self.rule.scores and forced is None
        shape = (shares, batch, heads, rows, self.rule.k if several else self.width)
        lists = counted.new_empty(shape) if not extra else counted.new_full(shape, -1)
        counts = counted[None] if not several else counted.new_empty(shape[:-1])
        picked = torch.empty(shape, dtype=torch.float32, device=lists.device) if several or kept else lists
        self.launch("choose_best", programs * shares, values | {
            "indices_ptr": lists, "counts_ptr": counts, "picked_ptr": picked, "shares": shares, "width": shape[-1],
            "lines": counted.numel(), "PICKED": several or kept,
        })  # fmt: skip
        if not several:
            return lists[0], counts[0], picked[0] if kept else None
        found, scores = _of_shares(lists, picked, self.rule.k, self.width)
        return found, (found >= 0).sum(-1, dtype=torch.int32), scores if kept else None

    def values(
        self, candidates: Candidates, forced: PairRule | None, softmax: Candidates | None, none: Tensor
    ) -> dict[str, Any]:  # fmt: skip
        """Arguments of the kernel by name, but for results; raises ``LeftToTorch``. ``none``: for a pointer that is not read."""
        form, tiles, (heads, rows, blocks), device = self.form, self.tiles, self.size, self.q.device
        extra = self.rule.extra and forced is not None
        within = isinstance(forced, Within) and forced.allowed is candidates.allowed
        spans, ranges = _ranges(candidates.allowed, device, ("firsts", "lasts", "span"))
        named, forced_ranges = _ranges(
            forced.rule if isinstance(forced, Within) and within else forced, device, ("forced_firsts", "forced_lasts", "forced")
        )
        if extra and (named > 1 or (within and spans)):
            raise LeftToTorch("forced blocks on top of the others, of several ranges")
        high, low = self.landmarks()
        several = form.group * heads
        names = ("begin", "end", "score_begin", "score_end")
        values: dict[str, Any] = {
            f"{name}_ptr": none for name in (*names, "firsts", "lasts", "forced_firsts", "forced_lasts", "totals")
        }
        values |= {f"{name}_{by}": 0 for name in (*names, "span", "forced") for by in ("batch", "head")}
        values |= {name.upper(): False for name in names} | ranges | forced_ranges | _limits(candidates, device)
        values |= {**strided("q", self.q), **strided("high", high), "low_ptr": low} | {
            "q_share": several // self.q.shape[1], "high_share": several // high.shape[1], "score_heads": several,
            "landmarks": high.shape[2], "rows": rows, "scale": self.scale, "mean": 1 / form.group if "group" in form.means else 1.0,
            "heads": heads, "tiles": in_tiles(rows, tiles.rows), "blocks": blocks, "k": self.rule.k, "start_block": self.start,
            "GROUP": form.group, "SIZE": form.size, "GREATEST": form.greatest, "RAGGED_MEAN": "regroup" in form.means,
            "SOFTMAX": form.softmax, "SPANS": spans, "FORCED": named, "FORCED_WITHIN": within and spans > 0, "EXTRA": extra,
            "BOUND": form.bound, "ALIGN": ALIGN if is_aligned(self.q, high, low) else 1, "WIDTH": self.q.shape[3],
            "BLOCK_D": filled(self.q.shape[3]), "ROWS": tiles.rows, "COLUMNS": tiles.columns, "KEPT": tiles.kept,
            "PRECISION": precision_of(self.q) if self.q.dtype == torch.float32 else "ieee",
        }  # fmt: skip
        if softmax is not None:
            values |= _limits(softmax, device, "score_")
            values["totals_ptr"] = torch.empty((self.q.shape[0], several, rows), dtype=torch.float32, device=device)
            self.launch("score_totals", self.q.shape[0] * several * values["tiles"], values)
        return values

    def launch(self, name: str, programs: int, values: dict[str, Any]) -> None:
        """Run a kernel on the current stream."""
        from sparsedsl.codegen.kernels import block_choice

        kernel = getattr(block_choice, name)
        with on(self.q.device):
            kernel[(programs,)](
                **{name: values[name] for name in kernel.arg_names}, num_warps=self.tiles.warps, num_stages=self.tiles.stages
            )


def _of_shares(lists: Tensor, picked: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The best of ``(shares, B, H, R, k)`` lists of ascending blocks, and their scores, likewise: ``(B, H, R, width)``."""
    blocks, scores = (t.movedim(0, 3).flatten(3) for t in (lists, picked))
    scores = scores.masked_fill(blocks < 0, float("-inf"))
    values, places = best(scores, k)  # places ascend as blocks do
    last = torch.iinfo(torch.int32).max
    chosen = blocks.gather(-1, places).masked_fill(values == float("-inf"), last)
    chosen, order = chosen.sort(dim=-1)
    missing_ = (0, width - chosen.shape[-1])
    found = torch.nn.functional.pad(chosen.masked_fill(chosen == last, -1), missing_, value=-1)
    return found, torch.nn.functional.pad(values.gather(-1, order), missing_, value=float("-inf"))
