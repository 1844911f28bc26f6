"""What attention must do whatever its numbers are: not see the future, not depend on how it is cut into calls or ordered."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD, KV_LEN, Q_LEN
from sparsedsl.testing.call_shapes import AttentionCase, tensor
from sparsedsl.testing.counterexamples import Counterexample, arguments_code
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_assertions import kernel_holds
from sparsedsl.testing.list_checks import allowed_pairs
from sparsedsl.testing.matching import as_attention, attention_code
from sparsedsl.testing.numerics import expect
from sparsedsl.testing.program_behaviour import program_is_causal, program_is_equivariant, program_prefill_equals_decode
from sparsedsl.testing.program_matching import compiled_program, is_program

__all__ = ["assert_causal", "assert_equivariant", "assert_prefill_equals_decode"]

_CASE = AttentionCase(batch=2, heads=4, kv_heads=2, q_len=24, kv_len=24)


def _inputs(case: AttentionCase, seed: int) -> list[torch.Tensor]:
    return [tensor(*shape, seed=seed + i) for i, shape in enumerate((case.q_shape, case.k_shape, case.v_shape))]


def _failure(
    what: str, assertion: str, attn: Attention, case: AttentionCase, seed: int, tables: dict[str, Any]
) -> Counterexample:
    return Counterexample(
        what,
        f"attn = {attention_code(attn)}",
        f"sd.testing.{assertion}({arguments_code('attn', case, seed=seed, **tables)})",
    )


def _reads(pattern: Pattern, symbol: Any) -> bool:
    return any(symbol in expr.free_symbols for expr in pattern.exprs)


# ---- the future --------------------------------------------------------------------------------------------


def assert_causal(attn: Any, case: AttentionCase = _CASE, *, seed: int = 0, **tables: Any) -> None:
    """No result at a position depends on queries, keys or values at later positions.

    For a number of positions, everything after the position is replaced by other, larger numbers: outputs and LSE up to
    it must stay the same to the last bit, no gradient of theirs may reach what comes after it, and their gradients must
    stay the same too.

    Of a program, choices up to the position must stay the same too, and its inputs are replaced as far as they are later (a landmark is
    as late as the last key of its chunk); results and gradients are compared up to rounding. A state must not change when a call goes
    on from it.

    Args:
        attn: a pattern or a node (run by the reference), what :func:`sparsedsl.compile` made of it, or a :class:`Kernel`.
        case: shape of the problem; a query row stands at ``q_offset`` plus its number.
        seed: of the inputs.
        tables: values of the pattern's tables, and of a program's inputs (others are drawn). They are held still: a table that was
            itself computed from the future is not noticed.

    >>> import sparsedsl as sd
    >>> assert_causal((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5))
    >>> assert_causal(sd.patterns.hsa(chunk=4, top_k=2))
    """
    if isinstance(attn, Kernel):
        kernel_holds(attn, "CAUS", case, _CASE, seed, tables)
        return
    if is_program(attn):
        return program_is_causal(compiled_program(attn), case, seed, tables)
    attn = as_attention(attn)
    before = _inputs(case, seed)
    after = [x + 4 * tensor(*x.shape, seed=seed + 3 + i) for i, x in enumerate(before)]
    first = case.q_offset
    for t in _some_positions(first, min(case.kv_len, first + case.q_len) - 1):
        # positions up to t: that many query rows and keys
        kept = (min(t + 1 - first, case.q_len), t + 1, t + 1)
        changed = [torch.cat([x[:, :, :n], y[:, :, n:]], dim=2) for x, y, n in zip(before, after, kept, strict=True)]
        fault = _moved(attn, case, before, changed, kept, tables)
        if fault:
            raise _failure(f"{fault} {_leak(attn.pattern, case, t, tables)}", "assert_causal", attn, case, seed, tables)


def _some_positions(first: int, last: int) -> list[int]:
    """All positions if they are few, else a few that include both ends."""
    if last - first < 6:
        return list(range(first, last + 1))
    return sorted({round(first + i * (last - first) / 5) for i in range(6)})


def _moved(
    attn: Attention,
    case: AttentionCase,
    before: list[torch.Tensor],
    changed: list[torch.Tensor],
    kept: tuple[int, int, int],
    tables: dict[str, Any],
) -> str | None:
    """Which result of the first rows moved with what comes later, in words, or None."""
    t = kept[1] - 1
    old, new = (_first_rows(attn, case, values, kept[0], tables) for values in (before, changed))
    for name, value in old.items():
        if name in ("out", "lse"):
            if not torch.equal(value, new[name]):
                return f"{name} up to position {t} changes when q, k and v after it change."
            continue
        n = dict(zip(("dq", "dk", "dv"), kept, strict=True))[name]
        if bool((value[:, :, n:] != 0).any()):
            return f"gradients of the results up to position {t} reach {name[1:]} after it."
        if not torch.equal(value[:, :, :n], new[name][:, :, :n]):
            return f"gradients of {name[1:]} up to position {t} change when q, k and v after it change."
    return None


def _first_rows(
    attn: Attention, case: AttentionCase, qkv: list[torch.Tensor], rows: int, tables: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Results of the first rows, and gradients of a function of them; what the lowering does not have is left out."""
    words: dict[str, Any] = {"q_offset": case.q_offset, **tables}
    try:
        leaves = [x.detach().requires_grad_() for x in qkv]
        given = attn(*leaves, return_lse=True, **words) if attn.has_lse else (attn(*leaves, **words),)
        out, *lses = (x[:, :, :rows] for x in given)
        total = out.square().sum() + sum(torch.where(torch.isfinite(lse), lse, 0.0).sum() for lse in lses)
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        results = zip(("out", "lse"), (x.detach() for x in (out, *lses)), strict=False)
        return dict(results) | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    except UnsupportedError:
        with torch.no_grad():
            return {"out": attn(*qkv, **words)[:, :, :rows]}


def _leak(pattern: Pattern, case: AttentionCase, t: int, tables: dict[str, Any]) -> str:
    """One pair through which it happens, in words; the mask may also be innocent."""
    later = allowed_pairs(pattern, case, **tables) & (case.env["kv_idx"] > case.env["q_idx"])
    if not later.any():
        return "The mask allows no later key, so it comes in otherwise."
    pairs = later.nonzero()
    b, h, row, kv = pairs[(pairs[:, 3] > t).nonzero()[0, 0] if bool((pairs[:, 3] > t).any()) else 0].tolist()
    return f"The mask allows b={b}, h={h}, q_idx={row + case.q_offset}, kv_idx={kv}."


# ---- cutting into calls ------------------------------------------------------------------------------------


def assert_prefill_equals_decode(
    attn: Any, case: AttentionCase = _CASE, *, chunks: tuple[int, ...] = (7,), seed: int = 0, **tables: Any
) -> tuple[str, ...]:
    """A whole sequence in one call, in chunks, and token by token gives the same results.

    Args:
        attn: a pattern or a node (run by the reference), what :func:`sparsedsl.compile` made of it, or a :class:`Kernel`.
        case: the whole problem; ``q_len`` rows are cut.
        chunks: chunk lengths to try besides single tokens.
        seed: of the inputs.
        tables: values of the pattern's tables, for all positions; of a program's inputs too (others are drawn).

    Returns:
        How it was cut: ``"one call"``, ``"chunks of 7"``, ..., ``"token by token"``, and ``"growing cache"`` if the pattern never
        looks ahead: then also with keys and values only up to the last query of each call, as a KV cache holds them. Of a program that
        keeps a state also ``"state, ..."``: each call is given its own tokens alone, and the state of the call before. Of a kernel
        ``("CUT",)``, the name of the property, whatever ``chunks``.

    Raises:
        PatternError: the pattern reads ``q_len``, which is the end of each call, so that calls are not meant to agree; or a program's
            choices read later queries.

    >>> import sparsedsl as sd
    >>> assert_prefill_equals_decode((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5))
    ('one call', 'chunks of 7', 'token by token', 'growing cache')
    """
    if isinstance(attn, Kernel):
        return kernel_holds(attn, "CUT", case, _CASE, seed, tables)
    if is_program(attn):
        return program_prefill_equals_decode(compiled_program(attn), case, chunks, seed, tables)
    attn = as_attention(attn)
    pattern = attn.pattern
    if _reads(pattern, Q_LEN):
        raise PatternError(
            f"{pattern!r} reads q_len, the position after the last query of a call: cut into other calls it means something "
            "else. Use kv_len, or a table of lengths, for a limit that all calls share"
        )
    q, k, v = _inputs(case, seed)
    wanted = expect(pattern, q, k, v, pattern.bound | tables, q_offset=case.q_offset)
    plans = [("one call", case.q_len, False), *((f"chunks of {n}", n, False) for n in chunks), ("token by token", 1, False)]
    later = allowed_pairs(pattern, case, **tables) & (case.env["kv_idx"] > case.env["q_idx"])
    if not later.any() and not _reads(pattern, KV_LEN) and case.q_offset + case.q_len <= case.kv_len:
        plans.append(("growing cache", 1, True))
    for name, length, growing in plans:
        for rows, end, out in _pieces(attn, case, (q, k, v), length, growing, tables):
            fault = wanted.fault("out", out, part=itemgetter((..., rows, slice(None))))
            if fault:
                what = f"{name}: rows {rows.start} to {rows.stop - 1} with {end} keys: {fault}"
                raise _failure(what, "assert_prefill_equals_decode", attn, case, seed, {"chunks": chunks, **tables})
    return tuple(name for name, _, _ in plans)


def _pieces(
    attn: Attention,
    case: AttentionCase,
    qkv: tuple[torch.Tensor, ...],
    length: int,
    growing: bool,
    tables: dict[str, Any],
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    q, k, v = qkv
    for start in range(0, case.q_len, length):
        rows = slice(start, min(start + length, case.q_len))
        end = case.q_offset + rows.stop if growing else case.kv_len
        yield rows, end, attn(q[:, :, rows], k[:, :, :end], v[:, :, :end], q_offset=case.q_offset + start, **tables)


# ---- order -------------------------------------------------------------------------------------------------


def assert_equivariant(attn: Any, case: AttentionCase = _CASE, *, seed: int = 0, **tables: Any) -> tuple[str, ...]:
    """Batch entries in another order give results in that order, and so do heads, as far as the pattern does not tell them apart.

    Returns:
        What was permuted: ``"batch"`` if the pattern does not read ``b``, ``"heads"`` if it does not read ``h`` (key heads with
        their query heads, and query heads within one key head). Of a program, only the batch. Of a kernel ``("PERM",)``, the name of
        the property: keys are put in another order too where nobody tells them apart.

    >>> import sparsedsl as sd
    >>> assert_equivariant((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4 + sd.h))
    ('batch',)
    """
    if isinstance(attn, Kernel):
        return kernel_holds(attn, "PERM", case, _CASE, seed, tables)
    if is_program(attn):
        return program_is_equivariant(compiled_program(attn), case, seed, tables)
    attn = as_attention(attn)
    pattern = attn.pattern
    q, k, v = _inputs(case, seed)
    allowance = expect(pattern, q, k, v, pattern.bound | tables, q_offset=case.q_offset)
    plain = attn(q, k, v, q_offset=case.q_offset, **tables).detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    done = []
    for name, symbol in (("batch", BATCH), ("heads", HEAD)):
        if _reads(pattern, symbol):
            continue
        done.append(name)
        out, order = _permuted(attn, case, (q, k, v), name, generator, tables)
        place = (order,) if name == "batch" else (slice(None), order)
        fault = allowance.fault("out", out, part=itemgetter(place), wanted=plain[place])
        if fault:
            what = f"results do not follow a permutation of the {name}, though the pattern does not read {symbol}: {fault}"
            raise _failure(what, "assert_equivariant", attn, case, seed, tables)
    return tuple(done)


def _permuted(
    attn: Attention,
    case: AttentionCase,
    qkv: tuple[torch.Tensor, ...],
    name: str,
    generator: torch.Generator,
    tables: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for inputs in another order, and that order."""
    q, k, v = qkv
    if name == "batch":
        order = torch.randperm(case.batch, generator=generator)
        return attn(q[order], k[order], v[order], q_offset=case.q_offset, **tables), order
    group = case.heads // case.kv_heads
    kv_order = torch.randperm(case.kv_heads, generator=generator)
    order = torch.cat([torch.randperm(group, generator=generator) + group * int(head) for head in kv_order])
    out = attn(q[:, order], k[:, kv_order], v[:, kv_order], q_offset=case.q_offset, **tables)
    return out, order
