"""Random attentions that read choices in every place of a mask, each twice: as a declaration, and worked out densely in plain torch.

The dense side shares no code with the library: masks are evaluated pair by pair, a choice's candidates are found by trying both of its
values at every pair, top-k is a sort. A case is drawn from a seed alone, so that a failure is a number.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import sparsedsl as sd
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.graph import as_program

Tensor = torch.Tensor
NEVER = float("-inf")


@dataclass
class Sizes:
    """Of a call."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    q_offset: int


@dataclass
class Choice:
    """A choice: what it is declared as, and its scores ``(B, Hs, query blocks, key blocks)`` from the inputs of a call."""

    node: Any
    rule: str
    number: float
    q_block: int
    kv_block: int
    scores: Callable[[dict[str, Tensor]], Tensor]
    among: Any = None  # a mask of this module, or None: where it decides
    forced: Any = None


@dataclass
class Grid:
    """Positions of every pair, as tensors that broadcast to ``(B, H, Sq, Skv)``, and the static tables."""

    b: Tensor
    h: Tensor
    q: Tensor
    kv: Tensor
    tables: dict[str, Tensor]


@dataclass
class Atom:
    """A condition on a pair: as declared, and by its positions. ``choice``: the number of a choice, whose value it is."""

    declared: Any
    holds: Callable[[Grid], Tensor] | None = None
    choice: int | None = None


@dataclass
class Join:
    """Two masks joined, or one negated."""

    sign: str
    parts: list[Any]


def declared(mask: Any) -> Any:
    """A mask as the library is given it."""
    if isinstance(mask, Atom):
        return mask.declared
    parts = [declared(part) for part in mask.parts]
    if mask.sign == "~":
        return ~parts[0]
    return {"&": lambda a, b: a & b, "|": lambda a, b: a | b, "^": lambda a, b: a ^ b}[mask.sign](*parts)


def holds(mask: Any, grid: Grid, chosen: dict[int, Any]) -> Any:
    """A mask at every pair, given the value of each choice there."""
    if isinstance(mask, Atom):
        return chosen[mask.choice] if mask.holds is None else mask.holds(grid)
    parts = [holds(part, grid, chosen) for part in mask.parts]
    if mask.sign == "~":
        return ~parts[0]
    return {"&": lambda a, b: a & b, "|": lambda a, b: a | b, "^": lambda a, b: a ^ b}[mask.sign](*parts)


def choices_in(mask: Any) -> set[int]:
    """Numbers of the choices that a mask reads."""
    if isinstance(mask, Atom):
        return set() if mask.choice is None else {mask.choice}
    return set().union(*map(choices_in, mask.parts))


@dataclass
class Case:
    """One attention. ``modify``: the score as a function of logits, positions and tables; ``learned``: tables with gradients."""

    seed: int
    sizes: Sizes
    program: Any
    mask: Any
    choices: list[Choice]
    modify: Callable[[Tensor, Grid, dict[str, Tensor]], Tensor]
    sink: Callable[[dict[str, Tensor]], Tensor] | None
    scale: float
    inputs: dict[str, Tensor]
    integers: dict[str, Tensor]
    chunks: tuple[int, str, str] | None = None  # the choice whose picks are normalised by themselves, weights, inner
    words: dict[str, Any] = field(default_factory=dict)


# ---- what it means, densely -----------------------------------------------------------------------------------------------------


def dense(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` with everything at every pair."""
    s = case.sizes
    grid = Grid(
        torch.arange(s.batch).view(-1, 1, 1, 1), torch.arange(s.heads).view(-1, 1, 1),
        torch.arange(s.q_len).view(-1, 1) + s.q_offset, torch.arange(s.kv_len), case.integers | inputs,
    )  # fmt: skip
    shape = (s.batch, s.heads, s.q_len, s.kv_len)
    with torch.no_grad():
        tables = [choose(case, number, grid, inputs) for number in range(len(case.choices))]
    at_pairs = {number: at_keys(case.choices[number], tables[number], case) for number in range(len(tables))}
    allowed = torch.as_tensor(holds(case.mask, grid, at_pairs)).expand(shape)
    k, v = (inputs[name].repeat_interleave(s.heads // s.kv_heads, 1) for name in "kv")
    logits = torch.einsum("bhqd,bhkd->bhqk", inputs["q"], k) * case.scale
    logits = case.modify(torch.where(allowed, logits, 1.0), grid, inputs).expand(shape)
    logits = torch.where(allowed, logits, NEVER)
    if case.chunks is not None:
        return _by_chunk(case, inputs, logits, v, tables[case.chunks[0]])
    if case.sink is not None:
        column = case.sink(inputs).view(1, -1, 1, 1).expand(*shape[:3], 1)
        logits = torch.cat([logits, column.to(logits)], 3)
    shares, lse = _softmax(logits)
    return shares[..., : s.kv_len] @ v, lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Shares along the last dimension and the LSE; of an empty row 0 and -inf."""
    empty = (logits == NEVER).all(-1, keepdim=True)
    safe = torch.where(empty, 0.0, logits)
    lse = safe.logsumexp(-1, keepdim=True)
    return torch.where(empty | (logits == NEVER), 0.0, torch.exp(safe - lse)), torch.where(empty, NEVER, lse)[..., 0]


def _by_chunk(case: Case, inputs: dict[str, Tensor], logits: Tensor, v: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    number, rule, inner = case.chunks  # type: ignore[misc]
    choice, heads = case.choices[number], case.sizes.heads
    chosen = chosen.repeat_interleave(heads // chosen.shape[1], 1)
    scores = choice.scores(inputs)
    scores = scores.repeat_interleave(heads // scores.shape[1], 1)
    missing = chosen.shape[3] - scores.shape[3]
    scores = torch.where(chosen, torch.nn.functional.pad(scores, (0, missing)), NEVER)
    if rule == "softmax":
        weights, total = _softmax(scores)
    else:  # sigmoid
        weights = torch.where(chosen, torch.sigmoid(torch.where(chosen, scores, 0.0)), 0.0)
        sums = weights.sum(-1)
        total = torch.where(sums > 0, torch.where(sums > 0, sums, 1.0).log(), NEVER)
    out: Any = 0.0
    for block in range(chosen.shape[3]):
        keys = slice(block * choice.kv_block, (block + 1) * choice.kv_block)
        part = logits[..., keys]
        if inner == "softmax1":
            part = torch.cat([part, torch.zeros_like(part[..., :1])], 3)
        shares, _ = _softmax(part)
        shares = shares[..., : v[:, :, keys].shape[2]]
        out = out + weights[..., block, None] * (shares @ v[:, :, keys])
    return out, total


def at_keys(choice: Choice, table: Tensor, case: Case) -> Tensor:
    """A choice at every pair: ``(B, H, Sq, Skv)``."""
    s = case.sizes
    wide = table.repeat_interleave(s.heads // table.shape[1], 1).repeat_interleave(choice.kv_block, 3)[..., : s.kv_len]
    return wide.repeat_interleave(choice.q_block, 2)[:, :, : s.q_len]


def choose(case: Case, number: int, grid: Grid, inputs: dict[str, Tensor]) -> Tensor:
    """What a choice chooses: ``(B, Hs, query blocks, key blocks)``."""
    choice, s = case.choices[number], case.sizes
    scores = choice.scores(inputs)
    blocks = -(-s.kv_len // choice.kv_block)
    scores = torch.nn.functional.pad(scores, (0, blocks - scores.shape[3]), value=NEVER).expand(s.batch, -1, -1, -1)
    among = _decided(case, number, grid) if choice.among is None else holds(choice.among, grid, {})
    candidates = _in_blocks(among, choice, case, scores.shape[1]) & (scores != NEVER)
    forced = torch.zeros_like(candidates)
    if choice.forced is not None:
        forced = _in_blocks(holds(choice.forced, grid, {}), choice, case, scores.shape[1]) & candidates
    scores = torch.where(candidates, scores, NEVER)
    if choice.rule == "threshold":
        return candidates & ((scores >= choice.number) | forced)
    order = torch.where(forced, float("inf"), scores).argsort(dim=3, descending=True, stable=True)
    rank = order.argsort(dim=3)
    if choice.rule == "top_k":
        return candidates & (rank < choice.number)
    mass, _ = _softmax(scores)
    ranked = mass.gather(3, mass.argsort(dim=3, descending=True, stable=True))
    before = ranked.cumsum(3) - ranked
    taken = torch.zeros_like(candidates).scatter(3, mass.argsort(dim=3, descending=True, stable=True), before < choice.number)
    return candidates & (taken | forced)


def _decided(case: Case, number: int, grid: Grid) -> Tensor:
    """The pairs at which a choice decides, for some values of the others."""
    s = case.sizes
    found = torch.zeros((s.batch, s.heads, s.q_len, s.kv_len), dtype=torch.bool)
    others = sorted(choices_in(case.mask) - {number})
    for values in itertools.product((True, False), repeat=len(others)):
        known: dict[int, Any] = {other: torch.tensor(value) for other, value in zip(others, values, strict=True)}
        on, off = (holds(case.mask, grid, known | {number: torch.tensor(value)}) for value in (True, False))
        found = found | (on ^ off)
    return found


def _in_blocks(pairs: Any, choice: Choice, case: Case, heads: int) -> Tensor:
    """Whether a block of queries and one of keys hold such a pair, for one of the heads that share a choice."""
    s = case.sizes
    pairs = torch.as_tensor(pairs).expand(s.batch, s.heads, s.q_len, s.kv_len)
    pairs = torch.nn.functional.pad(pairs, (0, -s.kv_len % choice.kv_block, 0, -s.q_len % choice.q_block))
    pairs = pairs.unflatten(3, (-1, choice.kv_block)).any(4).unflatten(2, (-1, choice.q_block)).any(3)
    return pairs.unflatten(1, (heads, -1)).any(2)


# ---- how one is drawn -----------------------------------------------------------------------------------------------------------


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """The case of a seed."""
    return _Drawing(seed, dtype).case()


class _Drawing:
    def __init__(self, seed: int, dtype: torch.dtype):
        self.seed, self.dtype, self.random = seed, dtype, random.Random(seed)
        self.inputs: dict[str, Tensor] = {}
        self.integers: dict[str, Tensor] = {}
        self.choices: list[Choice] = []
        self.sizes = self._sizes()
        s = self.sizes
        for name, heads, length, width in (
            ("q", s.heads, s.q_len, s.head_dim), ("k", s.kv_heads, s.kv_len, s.head_dim), ("v", s.kv_heads, s.kv_len, s.value_dim),
        ):  # fmt: skip
            self._input(name, s.batch, heads, length, width)

    def _input(self, name: str, *shape: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 7919 + len(self.inputs))
        self.inputs[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def _sizes(self) -> Sizes:
        r = self.random
        kv_heads, kv_len = r.choice((1, 1, 2, 3)), r.randint(2, 44)
        kind = r.choice(("square", "square", "decode", "some", "few keys"))
        q_len, offset = kv_len, 0
        if kind == "decode":
            q_len, offset = 1, kv_len - 1
        elif kind == "some":
            offset = r.randrange(kv_len)
            q_len = r.randint(1, kv_len - offset)
        elif kind == "few keys":
            q_len = r.randint(1, 30)
        return Sizes(
            r.choice((1, 1, 2)),
            kv_heads * r.choice((1, 2, 3)),
            kv_heads,
            q_len,
            kv_len,
            r.choice((4, 8)),
            r.choice((4, 6)),
            offset,
        )

    def case(self) -> Case:
        r, s = self.random, self.sizes
        chunks = None
        for _ in range(r.choice((1, 1, 2, 2, 3))):
            self._choice()
        if r.randrange(6) == 0 and self.choices[0].q_block == 1:
            mask: Any = Join("&", [self._read(0), self._mask(2, static=r.random() < 0.5)])
            chunks = 0, r.choice(("softmax", "sigmoid")), r.choice(("softmax", "softmax1"))
        else:
            mask = self._mask(3, static=False)
            read = self._read(0)
            if not choices_in(mask):
                mask = Join(r.choice("&|^"), [mask, read])
            if r.random() < 0.6:
                mask = Join("&", [self._causal(), mask])
        score, modify = self._score()
        sink, sink_value = self._sink() if chunks is None else (None, None)
        scale = r.choice((None, None, 0.3))
        words: dict[str, Any] = {"sink": sink, "scale": scale}
        if chunks is not None:
            words = {"scale": scale}
            words["normaliser"] = sd.per_chunk(self.choices[0].node, chunks[1], inner=chunks[2])
        program = sd.attend(declared(mask), score, **words)
        return Case(
            self.seed,
            s,
            program,
            mask,
            self.choices,
            modify,
            sink_value,
            scale or s.head_dim**-0.5,
            self.inputs,
            self.integers,
            chunks,
        )

    # ---- masks

    def _causal(self) -> Atom:
        return Atom(sd.kv_idx <= sd.q_idx, lambda g: g.kv <= g.q)

    def _static(self) -> Atom:
        r = self.random
        n, m = r.randint(1, 12), r.randint(2, 5)
        kind = r.choice(("causal", "window", "first", "stride", "own block", "ended", "heads", "documents", "mixed"))
        if kind == "documents":
            if "doc" not in self.integers:
                s = self.sizes
                length = max(s.kv_len, s.q_offset + s.q_len)
                generator = torch.Generator().manual_seed(self.seed)
                self.integers["doc"] = (torch.rand(s.batch, length, generator=generator) > 0.8).long().cumsum(1)
            doc = sd.table("doc")
            return Atom(
                doc[sd.b, sd.q_idx] == doc[sd.b, sd.kv_idx], lambda g: g.tables["doc"][g.b, g.q] == g.tables["doc"][g.b, g.kv]
            )
        made: dict[str, tuple[Any, Callable[[Grid], Tensor]]] = {
            "causal": (sd.kv_idx <= sd.q_idx, lambda g: g.kv <= g.q),
            "window": (sd.q_idx - sd.kv_idx < n, lambda g: g.q - g.kv < n),
            "first": (sd.kv_idx < n, lambda g: g.kv < n),
            "stride": ((sd.q_idx - sd.kv_idx) % m == 0, lambda g: (g.q - g.kv) % m == 0),
            "own block": (sd.q_idx // m == sd.kv_idx // m, lambda g: g.q // m == g.kv // m),
            "ended": ((sd.kv_idx // m + 1) * m <= sd.q_idx, lambda g: (g.kv // m + 1) * m <= g.q),
            "heads": (sd.h % 2 == 0, lambda g: g.h % 2 == 0),
            "mixed": ((sd.q_idx + sd.kv_idx + sd.h) % m != 0, lambda g: (g.q + g.kv + g.h) % m != 0),
        }
        return Atom(*made[kind])

    def _read(self, number: int) -> Atom:
        return Atom(self.choices[number].node & True, choice=number)

    def _mask(self, depth: int, *, static: bool) -> Any:
        r = self.random
        if depth == 0 or r.random() < 0.2:
            return self._static() if static or r.random() < 0.5 else self._read(r.randrange(len(self.choices)))
        if r.random() < 0.2:
            return Join("~", [self._mask(depth - 1, static=static)])
        return Join(r.choice("&&&|||^"), [self._mask(depth - 1, static=static) for _ in range(2)])

    # ---- choices

    def _choice(self) -> None:
        r, s = self.random, self.sizes
        number, block = len(self.choices), r.choice((1, 2, 3, 4, 8))
        q_block = r.choice((2, 4)) if r.random() < 0.15 and s.q_offset % 4 == 0 else 1
        name, asked = f"marks{number}", f"asks{number}"
        blocks, width = -(-s.kv_len // block), 3
        if r.random() < 0.5 and q_block == 1:
            heads = r.choice((1, s.kv_heads, s.heads))
            self._input(name, s.batch, heads, blocks, width)
            self._input(asked, s.batch, heads, s.q_len, width)
            made = sd.dot(
                sd.input(asked, f"batch h{number} queries w{number}"),
                sd.input(name, f"batch h{number} keys/{block} w{number}"),
                scale=1.0,
            )

            def scores(t: dict[str, Tensor]) -> Tensor:
                return torch.einsum("bhqd,bhud->bhqu", t[asked], t[name])
        else:
            rows = sd.q if q_block == 1 else sd.summary(sd.q, q_block)
            made = sd.dot(rows, sd.k if block == 1 else sd.summary(sd.k, block), scale=0.5)
            group = r.random() < 0.4
            made = made.over_group("sum") if group else made

            def scores(t: dict[str, Tensor]) -> Tensor:
                means = torch.stack([part.mean(2) for part in t["k"].split(block, 2)], 2).repeat_interleave(
                    s.heads // s.kv_heads, 1
                )
                rows = torch.stack([part.mean(2) for part in t["q"].split(q_block, 2)], 2)
                found = torch.einsum("bhqd,bhud->bhqu", rows, means) * 0.5
                return found.unflatten(1, (s.kv_heads, -1)).sum(2) if group else found

        rule = r.choice(("top_k", "top_k", "top_k", "threshold", "top_p"))
        among = r.choice((None, None, None, self._static_mask()))
        forced = r.choice((None, None, None, self._static()))
        words: dict[str, Any] = {"name": f"choice{number}"}
        words |= {"among": None if among is None else declared(among), "forced": None if forced is None else forced.declared}
        if rule == "top_k":
            amount: float = r.choice((1, 2, 3, 9))
            node: Any = sd.top_k(made, int(amount), **words)
        elif rule == "threshold":
            amount = r.choice((-0.3, 0.2))
            node = sd.threshold(made, amount, **words)
        else:
            amount = r.choice((0.4, 0.8))
            node = sd.top_p(made, amount, **words)
        self.choices.append(Choice(node, rule, amount, q_block, block, scores, among, forced))

    def _static_mask(self) -> Any:
        return Join(self.random.choice("&|"), [self._causal(), self._static()])

    # ---- scores and sinks

    def _score(self) -> tuple[Any, Callable[[Tensor, Grid, dict[str, Tensor]], Tensor]]:
        r, s = self.random, self.sizes
        kind = r.choice(("plain", "plain", "capped", "slope", "learned", "by row", "general", "dropped", "of scores"))
        if kind == "learned":
            self._input("bias", s.heads, 3)
            bias = sd.table("bias", learned=True)[sd.h, sd.kv_idx % 3]
            return sd.score * 0.5 + bias, lambda x, g, t: x * 0.5 + t["bias"][g.h, g.kv % 3]
        if kind == "by row":
            self._input("rowed", s.batch, 4)
            rowed = sd.table("rowed", learned=True)[sd.b, sd.q_idx % 4]
            return sd.score + rowed, lambda x, g, t: x + t["rowed"][g.b, g.q % 4]
        if kind == "of scores":
            block = r.choice((1, 2, 4))
            own = sd.dot(sd.q, sd.k if block == 1 else sd.summary(sd.k, block), scale=0.7)

            def modify(x: Tensor, g: Grid, t: dict[str, Tensor]) -> Tensor:
                means = torch.stack([part.mean(2) for part in t["k"].split(block, 2)], 2).repeat_interleave(
                    s.heads // s.kv_heads, 1
                )
                found = torch.einsum("bhqd,bhud->bhqu", t["q"], means) * 0.7
                return x + found.repeat_interleave(block, 3)[..., : s.kv_len]

            return sd.score + own, modify
        made: dict[str, tuple[Any, Any]] = {
            "plain": (None, lambda x, g, t: x),
            "capped": (sd.tanh(sd.score / 2) * 2, lambda x, g, t: torch.tanh(x / 2) * 2),
            "slope": (sd.score - 0.1 * (sd.q_idx - sd.kv_idx), lambda x, g, t: x - 0.1 * (g.q - g.kv).double()),
            "general": (
                sd.where(sd.q_idx - sd.kv_idx < 4, sd.score, sd.sigmoid(sd.score) * 3 - 0.2 * sd.h),
                lambda x, g, t: torch.where(g.q - g.kv < 4, x, torch.sigmoid(x) * 3 - 0.2 * g.h.double()),
            ),
            # What is no number where a pair is masked: the logarithm of a distance that is not above 0.
            "dropped": (
                sd.score - sd.log(sd.maximum(sd.q_idx - sd.kv_idx, 0) + 1),
                lambda x, g, t: x - torch.log((g.q - g.kv).clamp(min=0).double() + 1),
            ),
        }
        return made[kind]

    def _sink(self) -> tuple[Any, Any]:
        kind = self.random.choice(("none", "none", "number", "learned"))
        if kind == "none":
            return None, None
        if kind == "number":
            return 0.3, lambda t: torch.full((self.sizes.heads,), 0.3, dtype=torch.float64)
        self._input("sinks", self.sizes.heads)
        return sd.table("sinks", learned=True)[sd.h], lambda t: t["sinks"]


def results(case: Case, run: Any) -> dict[str, Tensor]:
    """Out, LSE, and the gradients of a function of both to every float that is given."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.inputs.items()}
    out, lse = run(leaves)
    found = {"out": out, "lse": lse}
    generator = torch.Generator().manual_seed(3)
    by_out, by_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    total = (out * by_out).sum() + torch.where(lse.isfinite(), lse * by_lse, 0.0).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if total.requires_grad else [None] * len(leaves)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: x.detach() for name, x in found.items()}


def run_on(case: Case, backend: str, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Out and LSE of the declaration on a backend."""
    # Choices that the mask turned out not to depend on are gone, and their inputs with them.
    program = as_program(case.program)
    read = set(case.program.tables) if program is None else set(program.inputs) | set(program.tables)
    attn = sd.compile(case.program, backend=backend, **({} if program is None else {"allow": [LATER_QUERIES]}))
    named = {name: x for name, x in (leaves | case.integers).items() if name in read and name not in "qkv"}
    return attn(*(leaves[name] for name in "qkv"), q_offset=case.sizes.q_offset, return_lse=True, **named)  # type: ignore[no-any-return]
