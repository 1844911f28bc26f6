"""What a cache must hold to go on after some tokens: a bound that is proved for a pattern, and what it says in keys and bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import check_size
from sparsedsl.analysis.key_intervals import intervals
from sparsedsl.analysis.past_reach import past_keys
from sparsedsl.analysis.proofs import PROVED, Verdict, Witness, causality
from sparsedsl.analysis.report import ITEM_BYTES
from sparsedsl.errors import ShapeError, TableError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.expressions import Index
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD, KV_LEN, Q_LEN
from sparsedsl.lang.tables import table_reads, table_specs
from sparsedsl.plain_values import Reported

__all__ = ["GROWS", "NOTHING", "STATE", "CacheBound", "pattern_bound"]

GROWS, STATE, NOTHING = "grows", "state", "nothing"
# More queries than any sequence has: a key that is read up to here is never done with.
ENDLESS = 1 << 48


@dataclass(frozen=True, eq=False)
class CacheBound(Reported):
    """What later queries may ask for of the keys seen so far; made by :func:`sparsedsl.cache_bound`.

    - ``kind``: the parts of it, joined by `` + ``: ``"first"``, ``"ring"``, ``"strided"``, ``"blocks"``; or ``"grows"`` (any key may be
      asked for again), ``"state"`` (a program that keeps a state), ``"nothing"``.
    - ``first``: so many first keys stay. ``recent``: a query sees no other key further back than this many, its own included: the ring.
      Numbers, or expressions in ``h`` and ``b`` where heads or batch entries differ.
    - ``every``, ``residues``: keys with ``kv_idx % every`` among these stay, too. None: there are none.
    - ``blocks``: of a program that reads other keys only by rows for blocks of them, which calls give: input name -> keys in a block. These
      rows all stay, and grow by one a block; ``keep`` and ``most`` are about keys.
    - ``verdict``: PROVED that this is enough, for all lengths and tables. Of what grows: why, with a pair where one is known.
    - ``witnesses``: ``"first"``, ``"recent"``, ``"every"`` -> a pair that is lost if the number is one less (a remainder is left out).
    - ``causal``: whether no query sees a later key. Where one does, keys must come in the same call as the queries that see them.
    - ``step``: of what chooses, what a step of decoding reads, in words.
    """

    _adds = ("is_bounded", "tight")
    _leaves_out = ("state_bytes",)

    kind: str
    pattern: Pattern | None
    verdict: Verdict
    first: int | Index = 0
    recent: int | Index = 0
    every: int | None = None
    residues: tuple[int, ...] = ()
    blocks: Mapping[str, int] = field(default_factory=dict)
    witnesses: Mapping[str, Witness] = field(default_factory=dict)
    causal: Verdict = PROVED
    step: str = ""
    state_bytes: Callable[..., int] | None = field(default=None, repr=False)

    @property
    def is_bounded(self) -> bool:
        """Whether fewer keys than all are enough in the long run. What has a strided part, or blocks, grows, too, but slower."""
        return self.kind not in (GROWS, STATE)

    @property
    def tight(self) -> bool:
        """Whether each number is known to be the least."""
        parts = {"first": self.first, "recent": self.recent, "every": self.every}
        return self.is_bounded and all(
            name in self.witnesses for name, part in parts.items() if part is not None and str(part) != "0"
        )

    @property
    def witness(self) -> Witness | None:
        """A pair of query and key for which a smaller ring, or else another smaller part, is not enough; of what grows, one far apart."""
        return next(
            (self.witnesses[name] for name in ("recent", "first", "every") if name in self.witnesses), self.verdict.witness
        )

    def death(self, key: int) -> int | None:
        """The last query that may read a key; None: there is none, it may be asked for at any time. A key that no query from its own on
        reads died before it came: ``key - 1``.

        >>> import sparsedsl as sd
        >>> chunks = sd.cache_bound(sd.patterns.causal() & sd.patterns.chunked(256))
        >>> chunks.death(0), chunks.death(255), chunks.death(256)
        (255, 255, 511)
        """
        check_size("key", key, 0)
        if self._readers is None:
            if not self.is_bounded or self._stays(torch.tensor([key]), self._number(self.first)).any():
                return None
            return key + max(self._number(self.recent), 0) - 1
        last = int(self._last(torch.tensor([key])))
        return None if last >= ENDLESS - 1 else max(last, key - 1)

    def keep(self, seen: int, *, batch: int | None = None, heads: int | None = None, **tables: Any) -> torch.Tensor:
        """The keys to hold after ``seen`` tokens, ascending: with these, and those to come, no later query misses one.

        ``batch``, ``heads``, ``tables``: what sizes are read from where these differ; the largest counts.

        >>> import sparsedsl as sd
        >>> local = (sd.q_idx - sd.kv_idx < 3) | (sd.kv_idx < 2)
        >>> sd.cache_bound(sd.patterns.causal() & local).keep(10).tolist()
        [0, 1, 8, 9]

        Raises:
            ShapeError, TableError: ``seen`` is no length, or heads, batch entries or a table that sizes depend on are missing.
        """
        check_size("seen", seen, 0)
        keys = torch.arange(seen)
        recent, first = self.sizes(batch=batch, heads=heads, **tables)
        return keys[self.needs(keys, seen, recent, first)]

    def sizes(self, *, batch: int | None = None, heads: int | None = None, **tables: Any) -> tuple[int, int]:
        """``recent`` and ``first`` as numbers: the largest of all heads and batch entries."""
        return self._number(self.recent, batch, heads, tables), self._number(self.first, batch, heads, tables)

    def needs(self, keys: torch.Tensor, seen: Any, recent: int, first: int) -> torch.Tensor:
        """Which of these keys a query from ``seen`` on may ask for. ``recent``, ``first``: see :meth:`sizes`."""
        if self.is_bounded:
            found = (seen - keys < recent) | self._stays(keys, first)
        else:
            found = torch.ones_like(keys, dtype=torch.bool)
        return found if self._readers is None else found & (self._last(keys) >= seen)

    def most(self, length: int, *, batch: int | None = None, heads: int | None = None, **tables: Any) -> int:
        """How many keys are held at most while ``length`` tokens go by."""
        check_size("length", length, 0)
        if not self.is_bounded:
            return length if self.kind == GROWS else min(length, self._number(self.first) + self._number(self.recent))
        return self.held(length, *self.sizes(batch=batch, heads=heads, **tables))

    def held(self, length: int, recent: int, first: int) -> int:
        """The same of sizes that are known."""
        strided = 0
        if self.every is not None:
            whole, left = divmod(length, self.every)
            strided = whole * len(self.residues) + sum(residue < left for residue in self.residues)
        return min(length, first + max(recent - 1, 0) + strided)

    def bytes(
        self, length: int, kv_heads: int, head_dim: int, dtype: Any = "bfloat16", *, head_dim_v: int | None = None, batch: int = 1,
        heads: int | None = None, sizes: Mapping[str, int] | None = None, given: Collection[str] = (), **tables: Any,
    ) -> int:  # fmt: skip
        """Memory for keys and values while ``length`` tokens go by, at most; of a state, what it takes.

        ``heads``: of the queries, where windows differ by head; all of a layer's heads hold as many keys as the one that needs most.
        Of programs, ``sizes``: of axes with names of their own; ``given``: inputs with a default that calls give nevertheless.

        >>> import sparsedsl as sd
        >>> window = sd.cache_bound(sd.patterns.causal() & sd.patterns.sliding_window(512))
        >>> window.bytes(32768, 8, 128) // 2**10, sd.cache_bound(sd.patterns.causal()).bytes(32768, 8, 128) // 2**10
        (2044, 131072)
        """
        for name, value in (("length", length), ("kv_heads", kv_heads), ("head_dim", head_dim), ("batch", batch)):
            check_size(name, value, 0 if name == "length" else 1)
        name = check_word("dtype", str(dtype).removeprefix("torch."), ITEM_BYTES)
        width = head_dim + (head_dim if head_dim_v is None else check_size("head_dim_v", head_dim_v, 1))
        if self.state_bytes is not None:
            return self.state_bytes(
                length, kv_heads, head_dim, name, head_dim_v=width - head_dim, batch=batch, heads=heads, sizes=sizes or {},
                given=given, tables=tables,
            )  # fmt: skip
        return batch * kv_heads * width * ITEM_BYTES[name] * self.most(length, batch=batch, heads=heads, **tables)

    @functools.cached_property
    def _readers(self) -> tuple[tuple[Any, Any], ...] | None:
        """Of the queries that read a key, as intervals: the last one, and what must hold of the key; None where no closed form says it."""
        if self.pattern is None:
            return None
        past = past_keys(self.pattern.mask.expr).needed
        found = intervals(past, of="queries")
        if found is None or past.free_symbols & {BATCH, HEAD, Q_LEN, KV_LEN} or table_reads(past):
            return None
        return tuple((interval.ends, sympy.And(*interval.conditions)) for interval in found)

    def _last(self, keys: torch.Tensor) -> torch.Tensor:
        """The last query that reads each key; -1 where none does."""
        env = {"q_idx": keys, "kv_len": ENDLESS}  # the two indices are exchanged
        last = torch.full_like(keys, -1)
        for (begin, end), holds in self._readers or ():
            first_query, last_query = (evaluate(part, env) for part in (begin, end))
            read = evaluate(holds, env) & (first_query <= last_query)
            last = torch.where(read, torch.maximum(last, last_query), last)
        return last

    def _stays(self, keys: torch.Tensor, first: int) -> torch.Tensor:
        found = keys < first
        if self.every is not None:
            found = found | torch.isin(keys % self.every, torch.tensor(self.residues, device=keys.device))
        return found

    def _number(
        self, value: int | Index, batch: int | None = None, heads: int | None = None, tables: Mapping[str, Any] | None = None
    ) -> int:  # fmt: skip
        if isinstance(value, int) or self.pattern is None:
            return int(value)
        given = {**self.pattern.bound, **(tables or {})}
        read = table_specs(value.expr)
        missing = [name for name in read if name not in given]
        if missing:
            raise TableError(f"how many keys stay is {value}: pass {missing[0]}=tensor, or bind it to the pattern")
        known = {name: torch.as_tensor(given[name]) for name in read}
        counts = {"h": (HEAD, heads, "heads"), "b": (BATCH, batch, "batch")}
        env: dict[str, Any] = dict(known)
        for name, (symbol, count, word) in counts.items():
            if symbol not in value.expr.free_symbols:
                continue
            lengths = [known[r.spec.name].shape[d] for r in table_reads(value.expr) for d, i in enumerate(r.args) if i == symbol]
            number = lengths[0] if lengths else count or (self.pattern.heads if symbol == HEAD else None)
            if number is None:
                what = "query heads" if name == "h" else "sequences"
                raise ShapeError(f"how many keys stay is {value}: pass {word}=, the number of {what}")
            env[name] = torch.arange(number, device=next((t.device for t in known.values()), None))
        if len(env.keys() & {"h", "b"}) == 2:
            env["b"] = env["b"][:, None]
        return int(evaluate(value.expr, env).max())

    def __str__(self) -> str:
        parts = []
        if self.kind == STATE:
            ends = [f"the {name} {number:,} tokens" for name, number in (("first", self.first), ("last", self.recent)) if number]
            parts.append(", with ".join(filter(None, ["of constant size", " and ".join(ends)])))
        if self.is_bounded:
            parts += [f"the first {_keys_text(self.first).removeprefix('1 ')}"] if str(self.first) != "0" else []
            parts += [f"a ring of {_keys_text(self.recent)}"] if str(self.recent) != "0" else []
            if self.every is not None:
                which = ", ".join(map(str, self.residues))
                parts.append(f"keys with kv_idx % {self.every} {f'== {which}' if len(self.residues) == 1 else f'in ({which})'}")
            parts += [f"a row of {name} for each {size:,} keys" for name, size in self.blocks.items()]
            text = f"{self.kind}: {', '.join(parts) or 'no key of the past'}; {self.verdict}{'' if self.tight else '; perhaps fewer'}"
        else:
            text = f"{self.kind}: {', '.join(parts) or self._why()}"
        text += f"; a step reads {self.step}" if self.step else ""
        return text if self.causal == PROVED else f"{text}; a query may see a later key, which must come in the same call"

    def _why(self) -> str:
        """Why no key may go."""
        pair = self.verdict.witness
        if pair is None:
            return f"{self.verdict.reason or 'any key may be asked for again'}, so that no bound is known"
        who = f" (head {pair.h}, batch entry {pair.b})" if pair.h or pair.b else ""
        reason = self.verdict.reason or "any key may be asked for again"
        return f"{reason}; as query {pair.q_idx:,} asks for key {pair.kv_idx:,}{who}"

    __repr__ = __str__

    def __deepcopy__(self, memo: Any) -> CacheBound:
        return self


def _keys_text(number: int | Index) -> str:
    if isinstance(number, int):
        return "1 key" if number == 1 else f"{number:,} keys"
    return f"{number} keys"


def pattern_bound(pattern: Pattern) -> CacheBound:
    """The bound of one attention over a static mask; see :func:`sparsedsl.cache_bound`."""
    found = past_keys(pattern.mask.expr)
    causal = causality(pattern.mask)
    if found.share is None:
        return CacheBound(GROWS, pattern, found.verdict, causal=causal)
    share = found.share
    first, recent = (_as_users_write(number, pattern) for number in (share.first, share.recent))
    words = {"first": first, "ring": recent, "strided": share.every}
    kind = " + ".join(word for word, part in words.items() if part is not None and str(part) != "0")
    return CacheBound(
        kind or NOTHING, pattern, found.verdict, first, recent, share.every, share.residues, {}, dict(found.witnesses), causal
    )  # fmt: skip


def _as_users_write(number: sympy.Expr, pattern: Pattern) -> int | Index:
    """A number, or an expression with the tables that the pattern binds."""
    read = table_specs(number)
    return int(number) if number.is_Integer else Index(number, {n: t for n, t in pattern.bound.items() if n in read})
