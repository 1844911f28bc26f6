"""FlexAttention callables -> expressions: :func:`trace_mask`, :func:`trace_score`, and the decorators ``@sd.mask`` and ``@sd.score``."""

from sparsedsl.tracing.decorators import mask
from sparsedsl.tracing.trace import trace_mask, trace_score

__all__ = ["mask", "trace_mask", "trace_score"]
