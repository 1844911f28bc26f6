"""What a layer runs that was given something: its pattern or program, compiled for the forms of call that come.

:class:`Binding` lies in the bound attention module, under the attribute :data:`BINDING`; ``attention_function`` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.analysis.proofs import PROVED, implies
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.cache_bounds import union_of
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.execute.kept_summaries import summarised
from sparsedsl.lang.expressions import kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.models.carried import Stack
from sparsedsl.models.derived import DerivedForm, derive, derived_program
from sparsedsl.models.graph_attention import handle_of
from sparsedsl.models.kept_keys import KeptKeys
from sparsedsl.models.native import Facts
from sparsedsl.models.program_cache import keeps_state
from sparsedsl.models.program_keys import FoldedKeys, WithSummaries
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import fitted, is_for_prefill, told_rows
from sparsedsl.program.relocation import reads_rows

__all__ = ["BINDING", "Binding", "made_again"]

BINDING = "_sparsedsl_binding"  # the attribute of a bound attention module


@dataclass(eq=False)
class Binding:
    """What one attention module runs. ``native``: the pattern is the model's own, which its caches are made for. ``facts``: what the mask
    says that the model makes for the layer. ``keeps_score``: soft cap and sinks are the layer's own. ``program``: runs in place of the
    pattern, which then is the model's own; one for prefill leaves it all calls but that of a whole prompt. ``stack``: the layers it is one
    of. ``count_slots``: the user's pattern counts slots, and not tokens. ``reached``: the module has called for it. ``held``: in a forward
    with a cache fitted to the pattern, the layer that holds its keys. ``bounds``: what is known of the caches of the layers it shares keys
    with. ``served``: paged caches that it was found to run with, by how many keys a request keeps in them."""

    index: int
    pattern: Pattern
    native: bool
    keeps_score: bool
    facts: Facts
    compiled: Compiled
    stack: Stack
    program: Program | None = None
    count_slots: bool = False
    reached: bool = False
    held: KeptKeys | WithSummaries | FoldedKeys | None = None
    _by_scale: dict[Any, Any] = field(default_factory=dict)
    _by_form: dict[Any, tuple[Any, frozenset[str]]] = field(default_factory=dict)
    _fits: dict[int, bool] = field(default_factory=dict)
    bounds: dict[Any, Any] = field(default_factory=dict)
    served: set[int | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Read while a graph is made: the tensors bound to tables, and the name of this binding in the graph.
        self.bound: dict[str, torch.Tensor] = dict((self.program or self.pattern).bound)
        self.handle = handle_of(
            self,
            {
                "index": self.index,
                "pattern": self.pattern.text,
                "program": None if self.program is None else self.program.text,
                "native": self.native,
                "keeps_score": self.keeps_score,
                "count_slots": self.count_slots,
                "facts": sorted(self.facts, key=str),
                "backend": self.compiled.backend,
                "allow": self.compiled.allow,
                "bound": list(self.bound),
            },
        )

    def attention(self, form: DerivedForm, scale: float | None, head_dim: int) -> tuple[Any, frozenset[str]]:
        """What runs in calls of this form, compiled, and the names of the tables it is to be given."""
        key = (form, scale) if self.attends_alone else form
        if key not in self._by_form:
            made: Pattern | Program
            if self.attends_alone:
                assert self.program is not None
                made = derived_program(fitted(self.program, self.index, self.pattern, scale, head_dim), form)
            else:
                made = derive(self.pattern, form)
            self._by_form[key] = self.compiled(made), frozenset(made.tables) - frozenset(made.bound)
        return self._by_form[key]

    @property
    def attends_alone(self) -> bool:
        """Whether the program is made of attentions to the layer's own keys and of nothing else: it then runs as a pattern does."""
        return self.program is not None and union_of(self.program) is not None

    @property
    def asks_for(self) -> Pattern | None:
        """A pattern that asks for the keys that calls after a prompt do; None: a program chooses or recurs."""
        return union_of(self.program) if self.program is not None and self.runs_program(whole=False) else self.pattern

    @property
    def keeps_state(self) -> bool:
        """Whether a program goes on from a state of constant size."""
        if self.program is None or not self.runs_program(whole=False) or reads_rows(self.program):
            return False
        return keeps_state(fitted(self.program, self.index, self.pattern, None, 1))

    @property
    def in_slots(self) -> bool:
        """Whether the indices of the pattern are slots: those of the model's own are, as in transformers' masks."""
        return self.native or self.count_slots

    def runs_program(self, whole: bool) -> bool:
        """Whether a call runs the program. ``whole``: queries and keys are those of all tokens so far."""
        return self.program is not None and (whole or not is_for_prefill(self.program))

    def program_attention(self, scale: float | None, head_dim: int, by_row: bool) -> Any:
        """The compiled program, with what is the layer's own. ``by_row``: for some rows of a batch, whose numbers the call gives."""
        assert self.program is not None
        by_row = by_row and reads_rows(self.program)
        if (scale, by_row) not in self._by_scale:
            program = fitted(self.program, self.index, self.pattern, scale, head_dim)
            self._by_scale[scale, by_row] = self.compiled(told_rows(program) if by_row else program)
        return self._by_scale[scale, by_row]

    @property
    def sums_up_keys(self) -> bool:
        """Whether steps of decoding run a program that chooses by summaries of keys."""
        return self.program is not None and self.runs_program(whole=False) and bool(summarised(self.program))

    def fits_window(self, window: int) -> bool:
        """Whether what runs after a prompt provably asks for none but the last ``window`` keys, the query's own included."""
        if self.runs_program(whole=False):
            return False
        if any(fits and known <= window for known, fits in self._fits.items()):
            return True
        if window not in self._fits:
            self._fits[window] = self.native or implies(self.pattern.mask, q_idx - kv_idx < window) == PROVED
        return self._fits[window]

    def tables(self, wanted: frozenset[str], known: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
        """The tables that are data of the call, by name: those of ``known``, and the sink logits among transformers' words."""
        tables = {name: known[name] for name in wanted if name in known}
        if "sinks" in wanted:
            if arguments.get("s_aux") is None:
                raise UnsupportedError(
                    f"layer {self.index} has no sink logits, but what it runs reads the table 'sinks'; bind it: bind(sinks=tensor)"
                )
            tables["sinks"] = arguments["s_aux"]
        return tables

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_by_form": {}, "_by_scale": {}, "held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()  # a copy is another binding, with tensors of its own


def made_again(words: dict[str, Any], pattern: Pattern, program: Program | None) -> Binding:
    """The binding that a handle of another process speaks of."""
    facts: Facts = frozenset((name, number) for name, number in words["facts"])
    compiled = Compiled(words["backend"], tuple(words["allow"]))
    native, keeps_score = words["native"], words["keeps_score"]
    return Binding(words["index"], pattern, native, keeps_score, facts, compiled, Stack({}, None), program, words["count_slots"])
