"""Which lowering runs a call, and why. Input: a pattern and plain facts of the call; output: a frozen, hashable :class:`Plan`."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.lang.pattern import Pattern

__all__ = ["BACKENDS", "CallFacts", "Plan", "check_backend", "choose", "flex_refusal"]

BACKENDS = ("auto", "reference", "flex")
# Up to this many logits the dense reference is quicker than making lists and waiting for a compile.
SMALL_LOGITS = 1 << 22
# The most memory `auto` lets the dense reference take for logits; an explicit backend="reference" is limited by the machine only.
DENSE_BYTES = 4 << 30


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

    @property
    def dense_bytes(self) -> int:
        """Peak bytes of a dense evaluation: about three copies of the logits, five with gradients."""
        return self.logits * (8 if self.dtype == "float64" else 4) * (5 if self.grad else 3)


@dataclass(frozen=True)
class Plan:
    """The decision: ``backend`` runs the call with tiles of ``block`` tokens (q, kv); ``reason`` says why, for ``explain``."""

    pattern_key: str
    backend: str
    block: tuple[int, int]
    reason: str


def check_backend(backend: object) -> str:
    """The backend's name, or a :class:`PatternError` with the valid ones."""
    if backend not in BACKENDS:
        coming = " (`tiled` and `triton` are not part of this release)" if backend in ("tiled", "triton") else ""
        raise PatternError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}{coming}")
    return str(backend)


def flex_refusal(facts: CallFacts) -> str | None:
    """Why FlexAttention cannot run the call, or None if it can."""
    if facts.dtype == "float64":
        return "FlexAttention has no float64"
    if facts.device == "cpu" and facts.grad:
        return "FlexAttention has no backward pass on CPU"
    if facts.device == "cpu" and facts.lse:
        return "FlexAttention does not return the LSE on CPU"
    return None


def choose(pattern: Pattern, facts: CallFacts, backend: str, block: tuple[int, int] = (128, 128)) -> Plan:
    """The plan for one call.

    Raises:
        UnsupportedError: the named backend cannot run the call, or under ``auto`` none can without holding more than
            4 GiB of logits. Nothing is ever replaced by something slower without being asked for.
    """
    refusal = flex_refusal(facts)
    if backend == "reference":
        return Plan(pattern.key, "reference", block, "asked for: dense, defines the meaning")
    if backend == "flex":
        if refusal is not None:
            raise UnsupportedError(
                f"backend 'flex' cannot run this call: {refusal}. Use backend='reference' (dense, needs about "
                f"{facts.dense_bytes / 2**30:.2g} GiB here)" + _way_out(facts)
            )
        return Plan(pattern.key, "flex", block, "asked for")
    if facts.logits <= SMALL_LOGITS:
        return Plan(
            pattern.key, "reference", block, f"{facts.logits:,} logits are few: dense is quicker than tile lists and a compile"
        )
    if refusal is None:
        return Plan(pattern.key, "flex", block, f"{facts.logits:,} logits: tiles that the pattern leaves empty are never visited")
    if facts.dense_bytes <= DENSE_BYTES:
        return Plan(pattern.key, "reference", block, f"{refusal}; dense needs about {facts.dense_bytes / 2**30:.2g} GiB")
    raise UnsupportedError(
        f"no lowering of this release can run the call: {refusal}, and the dense reference would need about "
        f"{facts.dense_bytes / 2**30:.3g} GiB. backend='reference' does it all the same if the memory is there" + _way_out(facts)
    )


def _way_out(facts: CallFacts) -> str:
    if facts.dtype == "float64":
        return "; or cast to float32: q.float()"
    if facts.grad:
        return "; or call under torch.no_grad() for inference"
    return "; or leave return_lse=False" if facts.lse else ""
