"""Plans: which tokens each rank holds, which keys it is sent, and how even that is."""

from __future__ import annotations

import functools
import hashlib
import math
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.errors import ArgumentError, TableError, UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.compiling import as_declared
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.parallel.assigning import METHODS, Rates, Task, assigned, costs_of, needed
from sparsedsl.parallel.exchange import Exchange, shard, unshard
from sparsedsl.parallel.fingerprints import digests
from sparsedsl.parallel.seen import check_planned, seen_by, seen_of_program
from sparsedsl.parallel.stages import certain_pattern, stages_of, whole_blocks
from sparsedsl.plain_values import Reported
from sparsedsl.program.graph import Program
from sparsedsl.quantities import factor_text, share_text

__all__ = ["TokenPlan", "check_size", "plan", "static_patterns"]

Tensor = torch.Tensor
# Chunks a rank where nobody says how large they are.
CHUNKS_A_RANK = 16


@dataclass(frozen=True, eq=False)
class TokenPlan(Reported):
    """One placement of ``q_len`` tokens on ``world`` ranks for the layers of a model; made by :func:`plan`.

    owner: the rank of each chunk of ``chunk`` tokens. method: how it was found. names: of the patterns. work: pairs of query and key that
    each rank computes, mean over heads, all patterns together.
    """

    _adds = ("imbalance", "received", "hash")

    q_len: int
    world: int
    chunk: int
    granule: int
    owner: tuple[int, ...]
    method: str
    names: tuple[str, ...]
    work: tuple[float, ...]
    tried: Mapping[str, tuple[float, int]]
    _needs: Mapping[str, Tensor]
    # Of each pattern the key of its mask, and what the tables held that it read.
    _masks: Mapping[str, tuple[str, Mapping[str, str]]]
    # Names of those that choose as they are called.
    _programs: frozenset[str] = frozenset()

    # ---- what a rank holds, and gets ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _holder(self) -> Tensor:
        """The rank of each token."""
        return torch.tensor(self.owner).repeat_interleave(self.chunk)[: self.q_len]

    @functools.cached_property
    def _granule_holder(self) -> Tensor:
        return torch.tensor(self.owner).repeat_interleave(self.chunk // self.granule)[: -(-self.q_len // self.granule)]

    def rows(self, rank: int) -> Tensor:
        """The positions of the tokens that a rank holds, rising."""
        return (self._holder == self._rank(rank)).nonzero()[:, 0]

    def keys(self, rank: int, name: str | None = None) -> Tensor:
        """The positions of the keys that a rank's queries see under a pattern, its own and those it is sent, rising."""
        return self._tokens(self._needs[self._name(name)][self._rank(rank)])

    def sent(self, source: int, target: int, name: str | None = None) -> Tensor:
        """The positions of the keys that one rank sends another."""
        held = self._granule_holder == self._rank(source)
        none = torch.zeros(0, dtype=torch.int64)
        return none if source == target else self._tokens(self._needs[self._name(name)][self._rank(target)] & held)

    def _tokens(self, granules: Tensor) -> Tensor:
        return granules.repeat_interleave(self.granule)[: self.q_len].nonzero()[:, 0]

    def traffic(self, name: str | None = None) -> Tensor:
        """Keys that rank ``i`` sends rank ``j`` under a pattern, int64 ``(world, world)``."""
        return self._traffic[self._name(name)].clone()

    @functools.cached_property
    def _traffic(self) -> Mapping[str, Tensor]:
        tokens = torch.full_like(self._granule_holder, self.granule)
        tokens[-1] = self.q_len - (tokens.numel() - 1) * self.granule
        found = {name: torch.zeros((self.world, self.world), dtype=torch.int64) for name in self.names}
        for name, sent in found.items():
            for rank, seen in enumerate(self._needs[name]):
                sent[:, rank].index_add_(0, self._granule_holder[seen], tokens[seen])
            sent.fill_diagonal_(0)
        return found

    @property
    def received(self) -> int:
        """Keys that the rank which gets the most is sent, all patterns together."""
        return int(torch.stack([self.traffic(name).sum(0) for name in self.names]).sum(0).max())

    def bytes(
        self, name: str | None = None, *, kv_heads: int, head_dim: int, itemsize: int = 2, head_dim_v: int | None = None
    ) -> int:
        """Bytes that the rank which gets the most is sent in the forward pass of one layer: keys and values of all key heads. The backward
        pass sends their gradients back, in float32."""
        if head_dim_v is None:
            head_dim_v = head_dim
        for word, value in (("kv_heads", kv_heads), ("head_dim", head_dim), ("itemsize", itemsize), ("head_dim_v", head_dim_v)):
            check_size(f"bytes(): {word}", value)
        return int(self.traffic(name).sum(0).max()) * kv_heads * (head_dim + head_dim_v) * itemsize

    @property
    def imbalance(self) -> float:
        """Most / mean pairs of a rank; 1 is even."""
        total = sum(self.work)
        return max(self.work) * self.world / total if total else 1.0

    @functools.cached_property
    def hash(self) -> str:
        """Of all that it says (32 hex digits): ranks compare it before they send anything."""
        words = [repr((self.q_len, self.world, self.chunk, self.granule, self.owner, self.names))]
        words += [hashlib.sha256(self._needs[name].numpy().tobytes()).hexdigest() for name in self.names]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]

    # ---- on ranks ----------------------------------------------------------------------------------------------------------------------

    def shard(self, x: Tensor, dim: int, mesh: Any) -> Tensor:
        """The rows of ``x`` that this rank holds, along ``dim``; ``x`` is the whole: tokens, labels, position ids. ``mesh``: a
        ``DeviceMesh`` with one dimension, or a process group."""
        return shard(self, x, dim, mesh)

    def unshard(self, x: Tensor, dim: int, mesh: Any) -> Tensor:
        """The whole again, on all ranks, of what each has the rows of; without gradients."""
        return unshard(self, x, dim, mesh)

    def on(self, mesh: Any, name: str | None = None, *, overlap: bool = False) -> Exchange:
        """This rank's part for layers of a pattern: ``attn(q, k, v, cp=plan.on(mesh, name), **tables)`` on local rows. All ranks make it
        at once, and compare their plans; make it once, and not with every call.

        Args:
            mesh: a ``DeviceMesh`` with one dimension, or a process group. name: of the pattern, where the plan is for several.
            overlap: attend to the rank's own keys while those of others are on their way, then to these, and merge the two by their LSE.
                It hides the transfer of the forward pass where own keys are much work, and costs a second call; results then differ by the
                rounding of a sum, in half precision by one more rounding of out. Of patterns with an LSE; programs take none.

        Raises:
            UnsupportedError: ranks have other plans, or ``overlap`` with a program.
            ShapeError: the mesh has another number of ranks.
        """
        name = self._name(name)
        if overlap and name in self._programs:
            raise UnsupportedError(
                f"overlap=True is for patterns whose keys are known before the call, and {name or 'this'} is a program: leave it out"
            )
        key, tables = self._masks[name]
        return Exchange(self, mesh, name, key, tables, overlap)

    # ---- words ----------------------------------------------------------------------------------------------------------------------

    def _name(self, name: str | None) -> str:
        if name is None and len(self.names) == 1:
            return self.names[0]
        if name not in self.names:
            raise ArgumentError(
                f"name must be that of a pattern of the plan, of {', '.join(map(repr, self.names))}; got {shown(name)}"
            )
        return name

    def _rank(self, rank: int) -> int:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.world:
            raise ArgumentError(f"rank must be a whole number from 0 to {self.world - 1}; got {shown(rank)}")
        return rank

    def __str__(self) -> str:
        ring = max(1, self.q_len - -(-self.q_len // self.world))
        lines = [
            f"{self.q_len:,} tokens on {self.world} ranks in chunks of {self.chunk:,}, granules of {self.granule}: {self.method}",
            f"pairs of the busiest rank: {factor_text(self.imbalance)} the mean",
        ]
        for name in self.names:
            most = int(self.traffic(name).sum(0).max())
            lines.append(
                f"keys sent to the rank that gets the most{f', {name}' if name else ''}: {most:,}, {share_text(most / ring)} of a ring's"
            )
        lines += [f"  {way}: {factor_text(uneven)}, {keys:,} keys" for way, (uneven, keys) in self.tried.items()]
        return "\n".join([*lines, f"hash {self.hash}"])

    def __repr__(self) -> str:
        return f"<TokenPlan {self.q_len} tokens on {self.world} ranks, {self.method}>"


def plan(
    patterns: Any,
    q_len: int,
    world: int,
    *,
    heads: int | None = None,
    chunk: int | None = None,
    granule: int = 128,
    equal: bool = True,
    method: str = "auto",
    rates: Rates | None = None,
    **tables: Any,
) -> TokenPlan:
    """Which rank holds which tokens, so that ranks compute equally much and send few keys: from what patterns see, before anything runs.

    Args:
        patterns: a pattern, or a mapping of names to the patterns of a model's layers, which get one placement of tokens. A program that
            chooses by blocks of keys (HSA, MoBA, NSA, Quest) is one, too: what it sees in any case is planned, and the call adds what it
            chooses; and so is one with recurrences (:func:`sparsedsl.linear`, :func:`sparsedsl.slots`), which send states.
        q_len: tokens, of queries and keys alike. world: ranks.
        heads: query heads; default those that the patterns are written for.
        chunk: tokens that stay together, a multiple of ``granule`` and of the blocks of programs; default a power of two of these
            that gives a rank 16 or more.
        granule: keys are sent in pieces of so many: what no query of a rank sees of is not sent.
        equal: ranks hold equally many chunks (one more or less where they do not divide).
        method: ``"auto"`` tries all and exchanges chunks: ``"contiguous"`` (neighbours together), ``"zigzag"`` (one part from the
            beginning and one from the end), ``"longest_first"`` (runs of 1, 2, 4, .. chunks, the heaviest first, to the rank that has
            least), ``"gathered"`` (chunks that see the same keys together, as far as work is even; ``"auto"`` leaves it out on many more
            than 100 ranks), ``"cuts"`` (neighbours, cut by work; only with ``equal=False``).
        rates: what a rank computes and receives in a second, :class:`~sparsedsl.parallel.assigning.Rates`.
        tables: those that masks read.

    Returns:
        A :class:`TokenPlan`. The same arguments give the same plan on every rank; nothing is sent for it.

    Raises:
        UnsupportedError: a pattern tells batch entries apart, or is a program that cannot run on ranks (one that goes by an order of all
            keys, say). ArgumentError: numbers that do not fit.

    >>> import sparsedsl as sd
    >>> found = sd.parallel.plan(sd.kv_idx <= sd.q_idx, 65536, 4, chunk=2048)
    >>> round(found.imbalance, 2), found.rows(0).numel()
    (1.0, 16384)
    >>> near = sd.parallel.plan(sd.patterns.sliding_window(256), 4096, 4, chunk=256)
    >>> near.method, near.received
    ('contiguous', 256)
    """
    if heads is not None:
        check_size("plan(): heads", heads)
    if not isinstance(equal, bool):
        raise ArgumentError(f"plan(): equal must be True or False; got {shown(equal)}")
    if not isinstance(rates, (Rates, types.NoneType)):
        raise ArgumentError(
            f"plan(): rates must be what a rank does in a second, sd.parallel.Rates(pairs=.., keys=..); got {shown(rates)}"
        )
    parts = planned_parts(patterns)
    masks = {name: _masks(part) for name, part in parts.items()}
    for name, found in masks.items():
        check_planned(name, found)
    chunk = _checked(q_len, world, chunk, granule, method, math.lcm(*(_whole(part) for part in parts.values())))
    unknown = set(tables) - {name for part in parts.values() for name in part.tables}
    if unknown:
        raise TableError(f"plan(): no pattern reads {', '.join(sorted(unknown))}")
    # The mask alone is asked: tables of scores need not be there.
    seen = [
        seen_by(attend(part.mask, heads=part.heads), q_len, chunk, granule, heads, _read_by(tables, part.mask.tables))
        if isinstance(part, Pattern)
        else seen_of_program(part, q_len, chunk, granule, heads, tables)
        for part in parts.values()
    ]
    work = torch.stack([one.work for one in seen]).sum(0)
    tokens = torch.full((-(-q_len // granule),), granule, dtype=torch.int64)
    tokens[-1] = q_len - (tokens.numel() - 1) * granule
    task = Task(
        work, [(one.chunk, one.first, one.stop) for one in seen], tokens, chunk // granule, world, equal, rates or Rates()
    )
    way, owner, costs = assigned(task, method)
    total = max(float(work.sum()), 1.0)
    tried = {name: (float(cost.work.max()) * world / total, int(cost.received.max())) for name, cost in costs.items()}
    needs = {name: needed(task, owner, number) for number, name in enumerate(parts)}
    known = {
        name: (
            part.mask.key if isinstance(part, Pattern) else part.key,
            digests(_read_by({**part.bound, **tables}, {table for mask in masks[name] for table in mask.mask.tables})),
        )
        for name, part in parts.items()
    }
    loads = tuple(costs_of(task, owner).work.tolist())
    programs = frozenset(name for name, part in parts.items() if not isinstance(part, Pattern))
    return TokenPlan(q_len, world, chunk, granule, owner, way, tuple(parts), loads, tried, needs, known, programs)


def planned_parts(patterns: Any) -> dict[str, Pattern | Program]:
    """What is to be planned, by name; ``""`` for one alone."""
    named = patterns if isinstance(patterns, Mapping) else {"": patterns}
    if not named or not all(isinstance(name, str) for name in named):
        raise ArgumentError(f"plan(): patterns must be a pattern, or a mapping of names to patterns; got {shown(named)}")
    return {name: _pattern(value) for name, value in named.items()}


def static_patterns(patterns: Any) -> dict[str, Pattern]:
    """The same where all that is sent is to be known before a call.

    Raises:
        UnsupportedError: a program chooses as it is called.
    """
    found: dict[str, Pattern] = {}
    for name, part in planned_parts(patterns).items():
        if not isinstance(part, Pattern):
            raise UnsupportedError(
                f"pattern {name or repr(part)} is a program that chooses as it is called, or sends states: what it sends is not known "
                "before, from a mask. Ask for the mask that its candidates lie in; sd.parallel.plan() takes the program itself"
            )
        check_planned(name, [part])
        found[name] = part
    return found


def _masks(part: Pattern | Program) -> list[Pattern]:
    """What of it is seen whatever is chosen."""
    return [part] if isinstance(part, Pattern) else [certain_pattern(part, node) for node in stages_of(part).late]


def _whole(part: Pattern | Program) -> int:
    """Tokens of which a multiple must stay together."""
    return 1 if isinstance(part, Pattern) else whole_blocks(part)[0]


def _pattern(value: Any) -> Pattern | Program:
    if isinstance(value, Attention):
        value = value.program
    declared = as_declared(value, "plan()")
    static = declared.static if isinstance(declared, Program) else None
    return declared if static is None else static


def _read_by(tables: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: table for name, table in tables.items() if name in names}


def check_size(what: str, value: Any) -> None:
    """Whether a value is a whole number of at least 1.

    Raises :class:`~sparsedsl.ArgumentError`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{what} must be a whole number of at least 1; got {shown(value)}")


def _checked(q_len: Any, world: Any, chunk: Any, granule: Any, method: Any, whole: int) -> int:
    for word, value in (("q_len", q_len), ("world", world), ("granule", granule)):
        check_size(f"plan(): {word}", value)
    if chunk is not None:
        check_size("plan(): chunk", chunk)
    check_word("plan(): method", method, ("auto", *METHODS))
    if chunk is None:
        chunk = math.lcm(granule, whole)
        while chunk * 2 * CHUNKS_A_RANK * world <= q_len:
            chunk *= 2
    if chunk % granule:
        raise ArgumentError(f"plan(): chunk must be a multiple of granule, {granule}; got {chunk}")
    if chunk % whole:
        raise ArgumentError(f"plan(): programs work on blocks, so that chunk must be a multiple of {whole} tokens; got {chunk}")
    if -(-q_len // chunk) < world:
        raise ArgumentError(
            f"plan(): {q_len} tokens in chunks of {chunk} are {-(-q_len // chunk)}, fewer than {world} ranks; give smaller chunks and "
            "granules, or fewer ranks"
        )
    return chunk
