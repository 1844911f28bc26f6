"""FlexAttention callables -> expressions: :func:`trace_mask` and :func:`trace_score`."""

from sparsedsl.tracing.trace import trace_mask, trace_score

__all__ = ["trace_mask", "trace_score"]
