"""Where the time of a program goes: one call with a clock around each node, without what the nodes before it took.

*Choosing*: summaries, scores, sorting, subsets and selections. *Moving*: rows gathered in an order, or kept and put back. *Attending*: all
that gives an output; the weights of HSA's chunks and block lists made from choices are part of it, as its kernels do that work, and so is
what it takes to read rows where they lie instead of moving them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.lowering import Lowering
from sparsedsl.execute.node_rules import LOWERED_RULES
from sparsedsl.program.branches import Compact
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Take
from sparsedsl.runtime.program_call import check_program_call

__all__ = ["KINDS", "kind_of", "split_call"]

KINDS = ("choosing", "moving", "attending")


def kind_of(node: Node) -> str:
    """What a node does."""
    if isinstance(node, (Compact, Take)):
        return "moving"
    return "attending" if node.gives == "branch" else "choosing"


def split_call(
    attn: Any, q: Any, k: Any, v: Any, named: Mapping[str, Any], wait: Callable[[], Any] = lambda: None
) -> tuple[Any, dict[str, float]]:
    """The output of ``attn(q, k, v, **named)`` and seconds of each of :data:`KINDS`. ``wait``: until the device is done."""
    seconds = dict.fromkeys(KINDS, 0.0)
    inner = [0.0]  # seconds of nodes inside those that are being evaluated, innermost last

    class Timed(Lowering):
        """Evaluates as usual; programs on kept tokens run in one of these too."""

        def value(self, node: Node) -> Any:
            if node in self.values:
                return self.values[node]
            wait()
            start = time.perf_counter()
            inner.append(0.0)
            result = super().value(node)
            wait()
            took = time.perf_counter() - start
            seconds[kind_of(node)] += took - inner.pop()
            inner[-1] += took
            return result

    class TimedDispatch(Dispatch):
        """Attention is attending whichever node asks for it."""

        def attend(self, *arguments: Any, **words: Any) -> Any:
            wait()
            start = time.perf_counter()
            result = super().attend(*arguments, **words)
            wait()
            took = time.perf_counter() - start
            seconds["attending"] += took
            inner[-1] += took
            return result

    call = check_program_call(attn.program, q, k, v, named)
    out, _ = Timed(LOWERED_RULES, call, TimedDispatch(attn.backend), lse=False).value(attn.program.root)
    return out.to(q.dtype), seconds
