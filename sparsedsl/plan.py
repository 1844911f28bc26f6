"""Which lowering runs a call, and why. Input: a pattern and plain facts of the call; output: a frozen, hashable :class:`Plan`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.pattern import Pattern

__all__ = ["BACKENDS", "TRITON_WIDEST", "CallFacts", "Costs", "Plan", "check_backend", "choose", "flex_refusal", "triton_refusal"]

BACKENDS = ("auto", "reference", "tiled", "flex", "triton")
# Up to this many logits the dense reference is quicker than cutting a mask into strips.
SMALL_LOGITS = 1 << 15
TRITON_DTYPES, TRITON_WIDEST = ("float16", "bfloat16", "float32"), 256
# How much quicker FlexAttention must be expected to be on CPU for `explain` to speak of it: as a ratio, and in seconds a call.
FLEX_GAIN, FLEX_SAVES = 1.25, 0.01


@dataclass(frozen=True)
class CallFacts:
    """What the choice depends on; plain values, no tensors. ``grad``: autograd wants gradients. Lengths in tokens."""

    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    grad: bool = False
    lse: bool = False

    @property
    def logits(self) -> int:
        """Number of logits a dense evaluation holds."""
        return self.batch * self.heads * self.q_len * self.kv_len


@dataclass(frozen=True)
class Costs:
    """Expected seconds of a forward pass on CPU; ``source``: where the rates behind them come from."""

    tiled: float
    flex: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The decision: ``backend`` runs the call with tiles of ``block`` tokens (q, kv); ``reason`` says why, for ``explain``."""

    pattern_key: str
    backend: str
    block: tuple[int, int]
    reason: str


def check_backend(backend: object) -> str:
    """The backend's name, or a :class:`PatternError` with the valid ones."""
    return check_word("backend", backend, BACKENDS)


def flex_refusal(facts: CallFacts) -> str | None:
    """Why FlexAttention cannot run the call, or None if it can."""
    if facts.dtype == "float64":
        return "FlexAttention has no float64"
    if facts.device == "cuda" and importlib.util.find_spec("triton") is None:
        return "FlexAttention on a GPU is compiled by Triton, which is not installed"
    if facts.device == "cpu" and facts.grad:
        return "FlexAttention has no backward pass on CPU"
    if facts.device == "cpu" and facts.lse:
        return "FlexAttention does not return the LSE on CPU"
    return None


def triton_refusal(facts: CallFacts, missing: Callable[[str], str | None]) -> str | None:
    """Why generated Triton kernels cannot run the call, or None if they can. ``missing``: what a kind of device lacks for them."""
    if facts.dtype not in TRITON_DTYPES:
        return f"the generated kernels have no {facts.dtype}"
    widest = max(facts.head_dim, facts.head_dim_v)
    if widest > TRITON_WIDEST:
        return f"the generated kernels have heads up to {TRITON_WIDEST} wide; this one is {widest}"
    return missing(facts.device)


def choose(
    pattern: Pattern,
    facts: CallFacts,
    backend: str,
    block: tuple[int, int] = (128, 128),
    *,
    costs: Callable[[], Costs] | None = None,
    missing: Callable[[str], str | None] = lambda device: "Triton was not looked for",
    fastest: Callable[[tuple[str, ...]], tuple[str, str] | None] = lambda backends: None,
) -> Plan:
    """The plan for one call.

    Args:
        costs: for ``explain``, to say where FlexAttention would be worth its compile. On CPU ``auto`` takes `tiled` in any case: a call
            must not wait for a compiler, nor need one, that nobody asked for.
        missing: what a kind of device ("cpu", "cuda") lacks for Triton kernels, or None.
        fastest: of backends on a GPU, what was measured to be the fastest and how that is known, or None.

    Raises:
        UnsupportedError: the named backend cannot run the call. Nothing is ever replaced by something else without being asked for.
    """
    refusal = flex_refusal(facts)
    if backend == "reference":
        return Plan(pattern.key, "reference", block, "asked for: dense, defines the meaning")
    if backend == "tiled":
        return Plan(pattern.key, "tiled", block, "asked for")
    if backend == "flex":
        if refusal is not None:
            raise UnsupportedError(
                f"backend 'flex' cannot run this call: {refusal}. Use backend='tiled' (torch's dense products on the tiles of the "
                f"pattern, with gradients and the LSE) or backend='reference' (dense)" + _way_out(facts)
            )
        return Plan(pattern.key, "flex", block, "asked for")
    if backend == "triton":
        reason = triton_refusal(facts, missing)
        if reason is not None:
            raise UnsupportedError(f"backend 'triton' cannot run this call: {reason}. Use backend='tiled', which runs everywhere")
        return Plan(pattern.key, "triton", block, "asked for")
    if facts.logits <= SMALL_LOGITS:
        return Plan(
            pattern.key,
            "reference",
            block,
            f"{facts.logits:,} logits are few: dense is quicker than cutting the mask into strips",
        )
    if facts.device != "cpu":
        return _on_gpu(pattern, facts, block, refusal, triton_refusal(facts, missing), fastest)
    if refusal is not None:
        return Plan(pattern.key, "tiled", block, refusal)
    if costs is None:
        return Plan(pattern.key, "tiled", block, "needs no compiler")
    expected = costs()
    why = f"expected {expected.tiled * 1e3:.3g} ms tiled, {expected.flex * 1e3:.3g} ms flex; rates {expected.source}"
    if expected.flex * FLEX_GAIN < expected.tiled and expected.tiled - expected.flex > FLEX_SAVES:
        why += "; backend='flex' may be worth its C++ compiler and a first call of 3 to 30 s"
    return Plan(pattern.key, "tiled", block, why)


def _on_gpu(
    pattern: Pattern,
    facts: CallFacts,
    block: tuple[int, int],
    flex: str | None,
    triton: str | None,
    fastest: Callable[[tuple[str, ...]], tuple[str, str] | None],
) -> Plan:
    """What ``auto`` takes on a GPU. ``flex``, ``triton``: why these cannot run the call."""
    can = tuple(name for name, refusal in (("triton", triton), ("flex", flex), ("tiled", None)) if refusal is None)
    known = fastest(can) if len(can) > 1 else None
    if known is not None:
        return Plan(pattern.key, known[0], block, known[1])
    if triton is None:
        return Plan(pattern.key, "triton", block, "kernels that know the pattern: nothing that it leaves empty is looked at")
    if flex is None:
        return Plan(pattern.key, "flex", block, f"{triton}; tiles that the pattern leaves empty are never visited")
    return Plan(pattern.key, "tiled", block, f"{triton}; {flex}")


def _way_out(facts: CallFacts) -> str:
    if facts.dtype == "float64":
        return "; or cast to float32: q.float()"
    if facts.grad:
        return "; or call under torch.no_grad() for inference"
    return "; or leave return_lse=False" if facts.lse else ""
