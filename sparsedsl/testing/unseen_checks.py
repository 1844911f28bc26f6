"""Keys that a query may not see have no effect on it, whatever they hold: an uninitialised row of a cache, say."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.testing.call_shapes import AttentionCase, tensor
from sparsedsl.testing.counterexamples import Counterexample, arguments_code
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_assertions import kernel_holds
from sparsedsl.testing.list_checks import allowed_pairs
from sparsedsl.testing.matching import as_attention, attention_code

__all__ = ["assert_unseen_keys_have_no_effect"]

_CASE = AttentionCase(batch=2, heads=4, kv_heads=2, q_len=24, kv_len=24)
# Finite, but its products with one another are not.
HUGE = 1e30
POISONS = (float("nan"), float("inf"), float("-inf"), HUGE)


def assert_unseen_keys_have_no_effect(attn: Any, case: AttentionCase = _CASE, *, seed: int = 0, **tables: Any) -> None:
    """What a query may not see has no effect on it: not NaN, not infinity, not numbers whose products overflow.

    Some keys, values and queries are replaced by such numbers. Queries that see none of them must have the outputs, LSE and gradients
    that they had before, and so must keys that no other query sees; the gradient of a key that nobody sees is exactly 0.

    Args:
        attn: a pattern (run by the reference), what :func:`sparsedsl.compile` made of it, or a :class:`Kernel` (which is given NaN and
            infinities where it declares ``poison=True``, else large finite numbers).
        case: shape of the problem.
        seed: of the inputs, and of what is replaced by what.
        tables: values of the pattern's tables.

    Raises:
        Counterexample: a result moved.

    >>> import sparsedsl as sd
    >>> assert_unseen_keys_have_no_effect((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5), seed=3)
    """
    if isinstance(attn, Kernel):
        kernel_holds(attn, "POIS", case, _CASE, seed, tables)
        return
    attn = as_attention(attn)
    group, drawn = case.heads // case.kv_heads, torch.Generator().manual_seed(seed)
    clean = [tensor(*shape, seed=seed + i) for i, shape in enumerate((case.q_shape, case.k_shape, case.v_shape))]
    poison = POISONS[seed % len(POISONS)]
    keys = torch.rand(case.k_shape[:3], generator=drawn) < (0.05, 0.2, 0.6)[seed % 3]
    # Every few times a query too, which has an effect on itself and on the keys that it sees.
    queries = (torch.rand(case.q_shape[:3], generator=drawn) < 0.1) & (seed % 4 == 3)
    where = (queries, keys & (seed % 5 != 0), keys & (seed % 5 != 1))
    dirty = [x.masked_fill(bad[..., None], poison) for x, bad in zip(clean, where, strict=True)]
    pairs = allowed_pairs(attn.pattern, case, **tables)
    hit = (pairs & ((where[1] | where[2]).repeat_interleave(group, 1)[:, :, None] | queries[..., None])).any(-1)
    touched = (pairs & hit[..., None]).any(2).unflatten(1, (-1, group)).any(2)
    unseen = ~pairs.any(2).unflatten(1, (-1, group)).any(2)
    fault = _moved(attn, case, clean, dirty, {"q": ~hit, "k": ~touched}, unseen, tables)
    if fault:
        raise Counterexample(
            f"{fault} when others hold {poison}",
            f"attn = {attention_code(attn)}",
            f"sd.testing.assert_unseen_keys_have_no_effect({arguments_code('attn', case, seed=seed, **tables)})",
        )


def _moved(
    attn: Attention, case: AttentionCase, clean: list[torch.Tensor], dirty: list[torch.Tensor], kept: dict[str, torch.Tensor],
    unseen: torch.Tensor, tables: dict[str, Any],
) -> str | None:  # fmt: skip
    """Which result is another, in words, or None."""
    old, new = (_results(attn, case, qkv, tables) for qkv in (clean, dirty))
    for name, value in old.items():
        rows = kept["k" if name in ("dk", "dv") else "q"]
        if not torch.allclose(value[rows], new[name][rows], rtol=1e-4, atol=1e-5, equal_nan=True):
            what = "keys that no affected query sees" if name in ("dk", "dv") else "queries that see none of the affected keys"
            return f"{name} of {what} changes"
        if name in ("dk", "dv") and bool((new[name][unseen] != 0).any()):
            return f"{name} of keys that nobody sees is not 0"
    return None


def _results(attn: Attention, case: AttentionCase, qkv: list[torch.Tensor], tables: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Results and gradients by name, as far as the lowering has them."""
    words: dict[str, Any] = {"q_offset": case.q_offset, **tables}
    try:
        leaves = [x.detach().requires_grad_() for x in qkv]
        given = attn(*leaves, return_lse=True, **words) if attn.has_lse else (attn(*leaves, **words),)
        slopes = [tensor(*x.shape, seed=i) for i, x in enumerate(given)]
        found = torch.autograd.grad(given, leaves, slopes, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        results = zip(("out", "lse"), (x.detach() for x in given), strict=False)
        return dict(results) | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    except UnsupportedError:
        with torch.no_grad():
            return {"out": attn(*qkv, **words)}
