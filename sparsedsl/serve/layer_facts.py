"""What an engine hands to a layer, and what was registered for it -> what the layer runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.analysis.proofs import PROVED, implies
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.cache_bounds import union_of
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.lang.expressions import Mask, Score, h, kv_idx, q_idx, score
from sparsedsl.lang.numeric import tanh
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.table_reads import table
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import check_program, fitted
from sparsedsl.program.rebuilding import rebuilt
from sparsedsl.program.relocation import Relocation, relocated
from sparsedsl.serve.layer_patterns import HANDED_IN, WAYS

__all__ = ["LayerFacts", "LayerRun"]

Tensor = torch.Tensor
_sinks, _slopes = table("sinks", dtype=float), table("slopes", dtype=float)


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """``heads``: query heads of this process, the first of which is number ``first_head`` of ``all_heads``. ``scale``: on dot products.
    ``window``: keys that the engine keeps, the query's own included. ``cap``: of logits. ``slopes``, ``sinks``: ``(heads,)``. None: it
    hands none in."""

    heads: int
    head_dim: int
    scale: float
    window: int | None = None
    cap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    first_head: int = 0
    all_heads: int | None = None

    @property
    def native(self) -> Pattern:
        """What a layer runs that nothing was registered for."""
        mask: Mask = kv_idx <= q_idx
        if self.window is not None:
            mask = mask & (q_idx - kv_idx < self.window)
        return attend(mask, self._score, sink=None if self.sinks is None else _sinks[h])

    @property
    def _score(self) -> Score | None:
        if self.cap is None and self.slopes is None:
            return None
        logit: Any = score
        if self.cap is not None:
            cap = int(self.cap) if float(self.cap).is_integer() else self.cap  # as one writes it
            logit = tanh(score / cap) * cap
        return logit if self.slopes is None else logit + _slopes[h] * (kv_idx - q_idx)

    @functools.cached_property
    def handed_in(self) -> dict[str, Tensor]:
        """Tables of the layer by name, by the number of a head in the whole; entries of heads that are elsewhere are 0."""
        others = self.first_head, (self.all_heads or self.heads) - self.first_head - self.heads
        given = {"sinks": self.sinks, "slopes": self.slopes}
        return {
            name: value if others == (0, 0) else torch.nn.functional.pad(value, others)
            for name, value in given.items()
            if value is not None
        }

    def run(self, name: str, given: Mask | Pattern | Program | None, compiled: Compiled) -> LayerRun:
        """What the layer of this name runs.

        Raises:
            UnsupportedError: something that the engine hands in would be lost. ShapeError, TableError: heads or tables do not fit.
        """
        where = f"layer {name}"
        if isinstance(given, Program):
            check_program(given, name, self.native, HANDED_IN)
            program = self._of_shard(fitted(given, name, self.native, self.scale, self.head_dim), where)
            return LayerRun(name, compiled(_bound(program, self._tables(program, where))), {}, None, program)
        pattern = self._of_shard(self._pattern(given, where), where)
        return LayerRun(
            name, compiled(pattern), self._tables(pattern, where), self.scale if pattern.scale is None else None, pattern
        )

    def _pattern(self, given: Mask | Pattern | None, where: str) -> Pattern:
        """A mask keeps what the engine hands in; a pattern says all of it."""
        native = self.native
        if given is None:
            return native
        if isinstance(given, Mask):
            return replace(native, mask=given)
        lost = ["logits_soft_cap"] if self.cap is not None and not given.has_score else []
        lost += ["alibi_slopes"] if self.slopes is not None and not given.has_score else []
        lost += ["sinks"] if self.sinks is not None and given.sink is None else []
        if lost:
            raise UnsupportedError(
                f"{where}: the model has {' and '.join(lost)}, and the pattern that was registered says nothing of "
                f"{'them' if len(lost) > 1 else 'it'}. Register a mask, pattern.mask, which keeps what is the layer's own, or say it in "
                "the pattern: sd.patterns.softcap(cap), sd.patterns.alibi(), sink=sd.table('sinks', dtype=float)[sd.h]"
            )
        return given

    def _of_shard(self, given: Any, where: str) -> Any:
        """What is meant for all heads, for those of this process."""
        whole = Program(given) if isinstance(given, Pattern) else given
        declared = next((part.heads for part in whole.expressions if part.heads is not None), None)
        total = self.all_heads or self.heads
        if declared not in (None, total):
            raise ShapeError(f"{where}: what was registered is for {declared} query heads, and the layer has {total}")
        if total == self.heads:
            return given
        moved = relocated(whole, Relocation(heads=(self.first_head, self.heads)))
        return moved.static if isinstance(given, Pattern) else moved

    def _tables(self, part: Pattern | Program, where: str) -> dict[str, Tensor]:
        """Those of the layer that it reads."""
        wanted = sorted(HANDED_IN & set(part.tables) - set(part.bound))
        missing = [name for name in wanted if name not in self.handed_in]
        if missing:
            words = {"sinks": "sinks", "slopes": "alibi_slopes"}
            raise TableError(
                f"{where}: what was registered reads the table {missing[0]!r}, and vLLM hands no {words[missing[0]]} to this layer; bind "
                f"it: pattern.bind({missing[0]}=tensor)"
            )
        return {name: self.handed_in[name] for name in wanted}


def _bound(program: Program, tables: dict[str, Tensor]) -> Program:
    def rewrite(part: Any) -> Any:
        own = {name: value for name, value in tables.items() if name in part.tables}
        return part.bind(**own) if own else part

    return rebuilt(program, lambda node: node, rewrite) if tables else program


@dataclass(eq=False)
class LayerRun:
    """What one layer runs. ``attention``: compiled, shared by layers that run the same. ``tables``: its own. ``scale``: of a call, None:
    the pattern has one. ``declared``: the pattern or program."""

    name: str
    attention: Any
    tables: dict[str, Tensor]
    scale: float | None
    declared: Pattern | Program
    _fits: int | None = None

    def check_window(self, window: int | None) -> None:
        """Refuse to ask for keys that an engine which keeps the last ``window`` may have let go of.

        Raises:
            UnsupportedError: it is not proved that none but the last keys, the query's own included, are asked for.
        """
        if window is None or (self._fits is not None and self._fits <= window):
            return
        asked = self.declared if isinstance(self.declared, Pattern) else union_of(self.declared)
        if asked is None or implies(asked.mask, q_idx - kv_idx < window) != PROVED:
            raise UnsupportedError(
                f"layer {self.name}: the model has sliding_window={window} here, so that vLLM lets go of earlier keys, and what was "
                f"registered may ask for them. Register & (sd.q_idx - sd.kv_idx < {window}), or serve the model without the window "
                f"(--hf-overrides). {WAYS.split(':')[0]}"
            )
        self._fits = window
