"""The text of generated kernels: what stands in loops and what does not, which tiles are visited, and sources once read and judged right.

Which tiles a kernel visits is found by running what it works out before its loops, with a stand-in for ``triton.language`` made of torch.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from collections import Counter
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.backends.triton.prepared import prepare
from sparsedsl.codegen.to_triton import TritonSource, triton_source, variant_of
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import as_pattern
from sparsedsl.program.branches import Branch

P = sd.patterns
causal = kv_idx <= q_idx
doc, width, limit = sd.table("doc", monotone=True), sd.table("width"), sd.table("limit")
chosen, bias = sd.table("chosen", dtype=bool), sd.table("bias", learned=True)
near, rows, columns, pairs = (sd.table(name, learned=True) for name in ("near", "rows", "columns", "pairs"))

NEED = {
    "chunked": (48,), "sliding_window": (64,), "strided": (8,), "strided_fixed": (8,), "dilated": (64, 4), "block_causal": (16,),
    "block_diffusion": (16,), "random_blocks": (64, 2, ), "neighbourhood_2d": (32, 48, (7, 5)), "neighbourhood_3d": (8, 16, 16, (3, 5, 5)),
    "sliding_tile": ((16, 16), (12, 12), (4, 4)), "alibi_window": (16, 256), "gemma2": (0,), "gemma3": (0,), "gpt_oss": (0,),
    "llama4": (0,), "prefix": (128,), "sinks": (4,), "global_tokens": (4,), "relative_bias": (64,), "softcap": (30,), "alibi": (8,),
    "sigmoid": (causal, 4096), "relu_squared": (causal,), "hstu": (causal, 4096), "softpick": (causal,),
}  # fmt: skip
NOT_PATTERNS = {"alibi_slope", "grid_position", "t5_bucket"}


def library() -> dict[str, Any]:
    """Every pattern of the library that its name and the arguments above make."""
    found = {}
    for name in set(P.__all__) - NOT_PATTERNS:
        function = getattr(P, name)
        needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
        arguments = NEED.get(name, ())
        if len(arguments) >= len(needed):
            made = function(*arguments)
            if isinstance(made, Branch):  # programs: their kernels are in codegen/kernels
                continue
            found[name] = sd.attend(causal, score=made) if isinstance(made, sd.Score) else as_pattern(made)
    return found


LIBRARY = dict(sorted(library().items()))  # in one order in all processes
# What the loops of these can be told from their text; no scores, which may hold any condition.
SPANS = {
    "full": True,
    "causal": causal,
    "window": causal & (q_idx - kv_idx < 20),
    "two-sided": abs(q_idx - kv_idx) <= 9,
    "window and sinks": causal & ((q_idx - kv_idx < 20) | (kv_idx < 3)),
    "three pieces": causal & ((kv_idx < 3) | (q_idx - kv_idx < 10) | ((kv_idx >= 20) & (kv_idx < 40))),
    "gap": abs(q_idx - kv_idx) > 12,
    "older": q_idx - kv_idx > 30,
    "chunks": causal & (q_idx // 24 == kv_idx // 24),
    "documents": causal & (doc[q_idx] == doc[kv_idx]),
    "windows by head": causal & (q_idx - kv_idx < width[h]),
    "prefix of a batch entry": causal | (kv_idx < 30 * b),
    "limits": kv_idx <= limit[q_idx],
    "half as fast": (2 * kv_idx + 1 <= q_idx) & (kv_idx // 3 >= 1),
    "even queries": causal & (q_idx % 2 == 0),
    "nothing": q_idx < -1,
}
# The queries that see a key are no intervals there.
LISTED_QUERIES = ("even queries", "limits")
LISTS = {"block table": chosen[q_idx // 8, kv_idx // 8], "scattered": (q_idx * kv_idx) % 7 < 2, "kept": causal & (kv_idx % 5 < 3)}
TABLES = {
    "doc": torch.arange(200) // 13,
    "width": torch.tensor([3, 25, 1, 60]),
    "limit": (torch.arange(200) * 5) % 90 - 9,
    "chosen": (torch.arange(20)[:, None] * 3 + torch.arange(20)) % 4 < 2,
}


def source_of(pattern: Any, **words: Any) -> TritonSource:
    pattern = as_pattern(pattern)
    return triton_source(pattern, variant_of(pattern, **words))


def functions(source: TritonSource) -> dict[str, ast.FunctionDef]:
    found = {node.name: node for node in ast.parse(source.text).body if isinstance(node, ast.FunctionDef)}
    return {kernel.name: found[kernel.name] for kernel in source.kernels}


def loops(function: ast.FunctionDef, kind: str) -> list[ast.For]:
    """The loops over full or partial tiles."""
    return [node for node in ast.walk(function) if isinstance(node, ast.For) and f"{kind}_tiles" in ast.unparse(node.iter)]


def work_of(loop: ast.For) -> list[ast.stmt]:
    """What a loop does with a tile: what follows its number."""
    return list(itertools.dropwhile(lambda one: not ast.unparse(one).startswith("start = "), loop.body))


# ---- which tiles are visited -------------------------------------------------------------------------------------------------------


class Number(torch.Tensor):
    """Integers as kernels have them: division truncates."""

    def __floordiv__(self, other: Any) -> Any:
        return torch.div(self, other, rounding_mode="trunc")

    def __rfloordiv__(self, other: Any) -> Any:
        return torch.div(torch.as_tensor(other), self, rounding_mode="trunc").as_subclass(Number)

    def __mod__(self, other: Any) -> Any:
        return torch.fmod(self, other)


def number(value: Any) -> Number:
    return torch.as_tensor(value).as_subclass(Number)


class Pointer:
    """Into a table or list; ``None`` for tensors whose values no loop depends on."""

    def __init__(self, values: torch.Tensor | None, at: Any = 0) -> None:
        self.values, self.at = values, at
        self.dtype = types.SimpleNamespace(element_ty=torch.float32)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.values, self.at + other)

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.values, self.at - other)


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    at = number(pointer.at)
    if pointer.values is None:
        return number(torch.zeros(at.shape))
    # Nothing may be read outside, except where a mask says so.
    at = at if mask is None else torch.where(number(mask), at, 0)
    values = pointer.values.reshape(-1)
    assert bool(((at >= 0) & (at < values.numel())).all()), "a read outside"
    return number(values[at.as_subclass(torch.Tensor).long()])


def stand_in(program: int) -> types.SimpleNamespace:
    """As much of ``triton.language`` as the code before the loops calls."""
    tensors = lambda f: lambda *words: f(*(number(w) if not isinstance(w, torch.Tensor) else w for w in words))  # noqa: E731
    return types.SimpleNamespace(
        program_id=lambda axis: number(program), num_programs=lambda axis: number(1), load=load, cdiv=lambda a, n: (a + n - 1) // n,
        arange=lambda a, z: number(torch.arange(a, z)), minimum=tensors(torch.minimum), maximum=tensors(torch.maximum),
        min=lambda t, axis: t.amin(axis), max=lambda t, axis: t.amax(axis),
        where=lambda c, x, y: torch.where(number(c), number(x), number(y)),
        zeros=lambda size, kind: number(torch.zeros(size)), full=lambda size, value, kind: number(torch.full(size, float(value))),
        multiple_of=lambda t, n: t, cast=lambda t, kind: number(t).to(kind), abs=tensors(torch.abs), floor=tensors(torch.floor),
        int1=torch.bool, int32=torch.int32, int64=torch.int64, float32=torch.float32, float64=torch.float64, constexpr=lambda value: value,
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def executed(source: TritonSource) -> dict[str, Any]:
    """The names of the module."""
    jit = lambda function=None, **words: function if function is not None else lambda given: given  # noqa: E731
    space: dict[str, Any] = {"triton": types.SimpleNamespace(jit=jit), "tl": stand_in(0)}
    exec(
        "from __future__ import annotations\n"
        + source.text.replace("import triton\n", "").replace("import triton.language as tl\n", ""),
        space,
    )
    return space


@functools.lru_cache(maxsize=1000)
def compiled(text: str, mode: str) -> Any:
    return compile(text, "kernel", mode)


def visited(source: TritonSource, kernel: str, arguments: dict[str, Any], program: int) -> dict[str, list[int]]:
    """Numbers of the full and of the partial tiles that one program visits, over all heads that it has."""
    space = {**executed(source), "tl": stand_in(program)}
    for argument in source.kernel(kernel).arguments:
        value = arguments.get(argument.name)
        if argument.type.startswith("*"):
            space[argument.name] = Pointer(value if argument.type.startswith(("*i", "*table")) else None)
        else:
            space[argument.name] = value if argument.type in ("constexpr", "fp32") else number(value or 0)
    found: dict[str, list[int]] = {"full": [], "partial": []}

    def run(statements: list[ast.stmt]) -> None:
        last = max(n for n, node in enumerate(statements) if any(isinstance(inner, ast.For) for inner in ast.walk(node)))
        for node in statements[: last + 1]:
            if not isinstance(node, ast.For):
                exec(compiled(ast.unparse(node), "exec"), space)
                continue
            kind = next((kind for kind in found if f"{kind}_tiles" in ast.unparse(node.iter)), None)
            bounds = [int(eval(compiled(ast.unparse(end), "eval"), space)) for end in node.iter.args]
            for i in range(*bounds):
                space[node.target.id] = number(i)
                if kind is None:
                    run(node.body)
                else:
                    for statement in itertools.takewhile(lambda one: not ast.unparse(one).startswith("start = "), node.body):
                        exec(compiled(ast.unparse(statement), "exec"), space)
                    found[kind].append(int(space["column"]))

    run(functions(source)[kernel].body)
    return found


CASES = ((80, 80, 0), (50, 90, 30), (70, 33, 0), (33, 64, 70))
BATCH, HEADS = 2, 2


def tiles(allowed: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, heads, tiles of queries, tiles of keys): whether any pair of the tile is allowed, and whether all that exist are."""
    m, n = block
    padding = (0, -allowed.shape[3] % n, 0, -allowed.shape[2] % m)

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(3, (-1, n)).unflatten(2, (-1, m)).transpose(3, 4)

    some = cut(torch.nn.functional.pad(allowed, padding, value=False)).flatten(4).any(4)
    return some, cut(torch.nn.functional.pad(allowed, padding, value=True)).flatten(4).all(4)


@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
@pytest.mark.parametrize("name", [*SPANS, *LISTS])
def test_tiles_that_are_visited(name, kernel):
    """Every tile with an allowed pair once, none with nothing if it can be helped, and as full only what is."""
    pattern, block = as_pattern((SPANS | LISTS)[name]), (16, 32) if kernel == "forward" else (32, 16)
    tables = {table: TABLES[table] for table in pattern.tables}
    for rows_, keys, offset in CASES:
        domain = Domain(rows_, keys, offset, BATCH, HEADS, tables)
        prepared = prepare(
            pattern, domain, torch.device("cpu"), (16, 16), lambda domain, block: classify(pattern.mask.expr, domain, block)
        )
        assert prepared.variant.keys == ("intervals" if name in SPANS else "lists")
        arguments: dict[str, Any] = {"heads": HEADS, "group": 2, "rows": rows_, "kv_len": keys, "q_offset": offset, "scale": 1.0}
        arguments |= {"BLOCK_M": block[0], "BLOCK_N": block[1], "ALIGN": 1, "HEAVY_FIRST": False}
        arguments |= {f"{table}_table": t for table, t in tables.items()}
        arguments |= {f"{table}_size_{i}": n for table, t in tables.items() for i, n in enumerate(t.shape)}
        arguments |= prepared.loop(kernel, block)
        places = {"b": torch.arange(BATCH).view(-1, 1, 1, 1), "h": torch.arange(HEADS).view(-1, 1, 1)}
        places |= {
            "q_idx": offset + torch.arange(rows_)[:, None],
            "kv_idx": torch.arange(keys),
            "q_len": offset + rows_,
            "kv_len": keys,
        }
        allowed = torch.as_tensor(evaluate(pattern.mask.expr, {**places, **tables})).expand(BATCH, HEADS, rows_, keys)
        some, full = tiles(allowed, block)
        ragged = torch.zeros_like(full)
        if kernel == "grad_kv":  # one program a tile of keys, over both heads
            ragged[:, :, -1] = rows_ % block[0] != 0
            some, full, ragged = (t.permute(0, 3, 1, 2).flatten(1, 1) for t in (some, full, ragged))
        else:
            ragged[..., -1] = keys % block[1] != 0
            some, full, ragged = (t.flatten(1, 2)[:, :, None] for t in (some, full, ragged))
        # One batch entry and one head, where the mask reads neither.
        entries = BATCH if b.expr in pattern.mask.expr.free_symbols else 1
        lines = some.shape[1] if h.expr in pattern.mask.expr.free_symbols or kernel == "grad_kv" else some.shape[1] // HEADS
        for program in (entry * some.shape[1] + line for entry in range(entries) for line in range(lines)):
            entry, line = divmod(program, some.shape[1])
            seen = visited(prepared.source, kernel, arguments, program)
            mine = [t[entry, line] for t in (some, full, ragged)]
            where = f"{name}, {kernel}, {(rows_, keys, offset)}, program {program}"
            wanted = Counter(mine[0].nonzero()[:, 1].tolist())
            found = Counter(seen["full"] + seen["partial"])
            assert not wanted - found, f"{where}: tiles left out {wanted - found}"
            assert max(found.values(), default=0) <= mine[0].shape[0], f"{where}: a tile twice: {found}"
            assert all(0 <= column < mine[0].shape[1] for column in found), f"{where}: a tile that does not exist: {found}"
            may_be_full = Counter((mine[1] & ~mine[2]).nonzero()[:, 1].tolist())
            assert not Counter(seen["full"]) - may_be_full, f"{where}: full tiles {seen['full']}, of which are {may_be_full}"
            if name in EXACT | NEARLY.keys() and wanted.total() < mine[0].shape[0]:
                # No row or key of the tile has anything to do with keys or queries that exist.
                assert found.total() <= wanted.total() + mine[0].shape[0], f"{where}: {found}, needed {wanted}"
            elif name in EXACT:
                assert found == wanted, f"{where}: {found}, needed {wanted}"
                assert Counter(seen["full"]) == may_be_full, f"{where}: as full {seen['full']}, are {may_be_full}"
            elif name in NEARLY:
                assert sum(found.values()) <= sum(wanted.values()) + NEARLY[name] * mine[0].shape[0], (
                    f"{where}: {found}, needed {wanted}"
                )


# Tiles with a pair that is allowed are visited, and no others; all that are full are taken as such.
EXACT = {"full", "causal", "window", "two-sided", "older", "chunks", "windows by head", "nothing", *LISTS}
# Not more than these too many a row: where two intervals meet in a tile, or do not quite fill it.
NEARLY = {"window and sinks": 1, "documents": 0, "gap": 1, "three pieces": 2, "prefix of a batch entry": 0}


# ---- what stands in loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPANS)
def test_spans_need_no_list_in_memory(name):
    source = source_of(SPANS[name])
    for kernel in source.kernels:
        if name in LISTED_QUERIES and kernel.name == "grad_kv":
            continue
        listed = {argument.name for argument in kernel.arguments} & {"full_starts_keys_ptr", "full_starts_queries_ptr"}
        assert not listed, f"{kernel.name} reads {listed}"
        ints = {argument.name for argument in kernel.arguments if argument.type == "*i32"}
        assert not ints or name == "documents", f"{kernel.name} reads {ints}"


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_compact(name):
    names = {argument.name for argument in source_of(LISTS[name]).kernel("forward").arguments}
    wanted = {f"{kind}_{part}_keys_ptr" for kind in ("full", "partial") for part in ("starts", "columns")}
    assert wanted <= names and not any(name.startswith(("first_", "last_")) for name in names)


@pytest.mark.parametrize("name", [*SPANS, *LISTS])
def test_full_tiles_have_no_condition(name):
    for head_dim in (64, 96, 128):
        for kernel, function in functions(source_of((SPANS | LISTS)[name], head_dim=head_dim)).items():
            for loop in loops(function, "full"):
                for node in (inner for statement in work_of(loop) for inner in ast.walk(statement)):
                    text = ast.unparse(node)
                    assert not isinstance(node, ast.Compare), f"{kernel}: {text}"
                    assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.where"), f"{kernel}: {text}"
                    assert not (isinstance(node, ast.keyword) and node.arg == "mask"), f"{kernel}: {text}"


@pytest.mark.parametrize("head_dim", [20, 72])
def test_full_tiles_of_other_widths_are_masked_by_width_alone(head_dim):
    for kernel, function in functions(source_of(causal, head_dim=head_dim)).items():
        compares = {
            ast.unparse(node)
            for loop in loops(function, "full")
            for s in work_of(loop)
            for node in ast.walk(s)
            if isinstance(node, ast.Compare)
        }
        assert all(text.startswith("d") and text.endswith(f"< {head_dim}") for text in compares), f"{kernel}: {compares}"
        assert compares or kernel not in ("forward", "grad_q", "grad_kv", "decode")


@pytest.mark.parametrize("name", SPANS)
def test_partial_tiles_compare_with_the_ends_of_intervals(name):
    """No predicate: a key against first and last, and against the length."""
    source = source_of(SPANS[name])
    for kernel, function in functions(source).items():
        if name in LISTED_QUERIES and kernel == "grad_kv":
            continue
        for loop in loops(function, "partial"):
            names = set()
            for statement in work_of(loop):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Compare):
                        ends = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
                        names |= {end.rstrip("0123456789_") if end[-1].isdigit() else end for end in ends}
            allowed = {"kv_idx", "row", "rows", "kv_len", "first", "last", "column", "start"}
            assert names <= allowed, f"{kernel}: {names - allowed}"


@pytest.mark.parametrize("name", LISTS)
def test_partial_tiles_of_lists_have_the_predicate(name):
    for kernel in ("forward", "grad_q"):
        (loop,) = loops(functions(source_of(LISTS[name]))[kernel], "partial")
        text = "\n".join(ast.unparse(statement) for statement in work_of(loop))
        assert "_idx" in text[text.index("tl.where(") :].splitlines()[0] or "allowed" in text or "cut = " in text


SAFE = [
    "full",
    "causal",
    "window",
    "two-sided",
    "window and sinks",
    "chunks",
    "documents",
    "three pieces",
    "prefix of a batch entry",
]


@pytest.mark.parametrize("name", SPANS)
def test_rows_are_checked_where_they_may_be_empty(name):
    text = ast.unparse(functions(source_of(SPANS[name]))["forward"])
    assert ("seen = " not in text) == (name in SAFE)
    assert ("tl.where(seen" not in text) == (name in SAFE)


def test_rows_with_a_sink_are_never_empty_and_rows_without_a_key_of_their_own_may_be():
    def checks(pattern: Any, **words: Any) -> bool:
        return "seen" in ast.unparse(functions(source_of(pattern, **words))["forward"])

    assert not checks(sd.attend(SPANS["older"], sink=0.0))
    assert checks(SPANS["window"], own_key=False) and not checks(SPANS["causal"], own_key=False)
    assert checks(sd.attend(causal, score=sd.where(kv_idx > 3, score, float("-inf"))))


@pytest.mark.parametrize("name", ["window", "documents", "block table", "three pieces"])
def test_64_bits_only_where_the_variant_says_so(name):
    pattern = (SPANS | LISTS)[name]
    for kernel, function in functions(source_of(pattern)).items():
        for kind in ("full", "partial"):
            assert all("int64" not in ast.unparse(loop) for loop in loops(function, kind)), kernel
        rows_ = [
            ast.unparse(n)
            for n in ast.walk(function)
            if isinstance(n, ast.Assign) and ast.unparse(n).startswith(("row = ", "key = "))
        ]
        assert all("int64" not in line for line in rows_), f"{kernel}: {rows_}"
    for kernel, function in functions(source_of(pattern, wide=True)).items():
        for kind in ("full", "partial"):
            for loop in loops(function, kind):
                assert "start = tl.cast(column, tl.int64)" in ast.unparse(loop), kernel


LEARNED = {
    "by difference": sd.attend(causal, score=score + near[h, q_idx - kv_idx]),
    "by query and key": sd.attend(causal, score=score * rows[h, q_idx] + columns[kv_idx]),
    "by pair": sd.attend(causal, score=score + pairs[q_idx, kv_idx]),
}
EVERYTHING = {**{f"library {name}": pattern for name, pattern in LIBRARY.items()}, **SPANS, **LISTS, **LEARNED}
# Set whether or not they are needed: the positions of a tile, gradients of the products in the kernels of
# tables; and the number of the tile in loops over none.
SPARE = {"q_idx", "kv_idx", "q_len", "ds", "i"}
# One expression of the pattern, with all its parentheses, is one line; a network has one for each of its 32 units.
LONGEST_LINE = dict.fromkeys(EVERYTHING, 440) | {"library fire": 32 * 440}


def test_the_library_is_all_there():
    assert len(LIBRARY) >= 25, sorted(LIBRARY)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_source_is_plain_python_without_atomics(name):
    for words in ({"head_dim": 64}, {"head_dim": 96, "head_dim_v": 40}):
        source = source_of(EVERYTHING[name], **words)
        code = source.text.partition('"""\n\n')[2]
        assert "atomic" not in code and max(map(len, code.splitlines())) <= LONGEST_LINE[name]
        for kernel, function in functions(source).items():
            parameters = [a.arg for a in function.args.args]
            assert parameters == [a.name for a in source.kernel(kernel).arguments] and len(set(parameters)) == len(parameters)
            stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            assert not stored - read - SPARE, f"{kernel} never reads {stored - read - SPARE}"


@pytest.mark.parametrize("name", ["acc", "tile", "d", "x", "out", "lse", "rows", "tl", "b_0", "first", "score_0"])
def test_tables_may_have_any_name(name):
    table, other = sd.table(name, learned=True), sd.table("another", learned=True)
    texts = [source_of(sd.attend(causal, score=score + t[h] * t[kv_idx]), head_dim=96).text for t in (table, other)]
    ours, theirs = (text.partition('"""\n\n')[2] for text in texts)
    names = [
        {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
        | {n.arg for n in ast.walk(ast.parse(text)) if isinstance(n, ast.arg)}
        for text in (ours, theirs)
    ]
    assert len(names[0]) == len(names[1]), names[0] ^ names[1]


# ---- sources once read and judged right ----------------------------------------------------------------------------------------------

WHOLE = {"causal": (P.causal(), 128), "window_and_sinks": (P.causal() & (P.sliding_window(512) | P.sinks(4)), 64)}
TILES = ("# The keys each query sees", "# The softmax so far")
CUT_TILES = ("# Tiles that the mask or the end of the keys cuts", "        larger = ")
RESIDUE = ("# Queries and keys of one residue", "    row = ")
# What a pattern has of its own: kernel, first line and the line after the last.
SECTIONS = {
    "window": (
        P.sliding_window(512),
        [("forward", *TILES), ("grad_kv", "# The queries that see each key", "    for member in ")],
    ),
    "packed": (P.packed(), [("forward", *TILES), ("forward", *CUT_TILES)]),
    "soft_cap_and_alibi": (
        sd.attend(P.causal(), score=P.softcap(30, P.alibi(8))),
        [
            ("_tanh", "def _tanh", "\n"),
            ("forward", *CUT_TILES),
            ("grad_q", "for i in range(0, partial_tiles)", "        grad_q = "),
        ],
    ),
    "blocks": (P.blocks(), [("forward", "# The tiles to visit", "# The softmax so far"), ("forward", *CUT_TILES)]),
    "dilated": (
        P.dilated(64, 4),
        [
            ("forward", *RESIDUE),
            ("forward", "lse = ", "\n"),
            ("grad_kv", RESIDUE[0], "    key = "),
            ("grad_kv", "delta_tile = ", "for i in "),
        ],
    ),
    "relative_bias": (
        sd.attend(P.sliding_window(64), score=P.relative_bias(64)),
        [("forward", *CUT_TILES), ("grad_relative_bias_0", "def grad_relative_bias_0", "\n")],
    ),
}


def section(text: str, kernel: str, begin: str, end: str) -> str:
    """The lines of a kernel from the one that holds ``begin`` to before the next that holds ``end`` (a line break: to its end)."""
    (body,) = [body for body in text.split("\n\n\n") if f"\ndef {kernel}(" in body]
    lines = body.splitlines(keepends=True)
    (first,) = [i for i, line in enumerate(lines) if begin in line][:1]
    last = next((i for i in range(first + 1, len(lines)) if end != "\n" and end in lines[i]), len(lines))
    assert end == "\n" or last < len(lines), f"{kernel} has no {end!r} after {begin!r}"
    return f"... {kernel}\n" + "".join(lines[first:last])


@pytest.mark.parametrize("name", WHOLE)
def test_golden(golden, name):
    pattern, head_dim = WHOLE[name]
    assert golden == source_of(pattern, head_dim=head_dim).text


@pytest.mark.parametrize("name", SECTIONS)
def test_golden_sections(golden, name):
    pattern, parts = SECTIONS[name]
    text = source_of(pattern, head_dim=64).text
    assert golden == "\n".join(section(text, *part).rstrip("\n") + "\n" for part in parts)
