"""The lowering of a program: a rule for every kind of node, over lists, full tiles and scans; whatever a backend has for it."""

from __future__ import annotations

import torch

from sparsedsl.execute.attend_rule import attend_node
from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.kept_summaries import BlockRows
from sparsedsl.execute.linear_rule import run_linear
from sparsedsl.execute.lowering import Lowering, Shortcut
from sparsedsl.execute.paged_keys import RequestKeys
from sparsedsl.execute.score_rules import SCORE_RULES
from sparsedsl.execute.selection_rules import LISTED_RULES
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program import tensors
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Mix, Recall
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Take
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.sources import Slots
from sparsedsl.program.tensors import Input, Summary
from sparsedsl.runtime.call import wants_grad
from sparsedsl.runtime.heads import NEVER, lse_merge
from sparsedsl.runtime.interpreter import Rule
from sparsedsl.runtime.placed_rows import gather_rows, scatter_rows
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.runtime.scan_calls import sparing
from sparsedsl.selection import proxies
from sparsedsl.torch_private import transforms_active

__all__ = ["LOWERED_RULES", "lowered"]

Tensor = torch.Tensor
# Output, and LSE where it is wanted.
Result = tuple[Tensor, Tensor | None]


def lowered(
    call: ProgramCall, dispatch: Dispatch, *, lse: bool, shortcuts: dict[Node, Shortcut] | None = None, keeps: bool = False,
    summaries: BlockRows | None = None, in_pages: RequestKeys | None = None,
) -> Lowering:  # fmt: skip
    """One evaluation of a call by backends: see :class:`~sparsedsl.execute.lowering.Lowering`."""
    return Lowering(
        LOWERED_RULES, call, dispatch, lse=lse, shortcuts=shortcuts, keeps=keeps, summaries=summaries, in_pages=in_pages
    )


# ---- tensors -------------------------------------------------------------------------------------------------------------------


def _input(run: Lowering, node: Input) -> Tensor:
    """As it was given: half precision is cast piece by piece, where it is used."""
    if run.in_pages is not None and node in run.in_pages.inputs:
        return run.in_pages.all(node)
    if node in run.call.inputs:
        return run.call.inputs[node]
    assert node.default is not None
    return run.value(node.default)


def _summary(run: Lowering, node: Summary) -> Tensor:
    if node.stride is not None:
        stride, how = node.stride, node.how
        return run.pooled(node, node.x, lambda x: proxies.windowed(x, node.block, stride, how))  # type: ignore[arg-type]
    x, places = run.placed(node.x) if run.in_pages is None else (run.shaped(node.x), None)
    pool = run.dispatch.pooler(x)
    if pool is not None and places is not None:
        found = pool(x, node.block, node.how, node.pad, places)
        if found is not None:
            return found

    def make(x: Tensor) -> Tensor:
        found = None if pool is None else pool(x, node.block, node.how, node.pad)
        return proxies.pooled(x, node.block, node.how, node.pad) if found is None else found  # type: ignore[arg-type]

    if run.keeps and pool is not None:
        run.shortcuts[node] = lambda run: run.pooled(node, node.x, make)
    return run.pooled(node, node.x, make)


def _take(run: Lowering, node: Take) -> Tensor:
    return gather_rows(run.value(node.x), run.value(node.order))


# ---- recurrences ---------------------------------------------------------------------------------------------------------------


def _slots(run: Lowering, node: Slots) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What a scan makes slots of: keys, values, gates, document ids."""
    documents = None if node.documents is None else run.value(node.documents)
    return run.value(node.y), run.value(node.z), sparing(run.value(node.gate), node.first), documents


def _recall(run: Lowering, node: Recall) -> Result:
    memory, q = node.memory, run.value(node.x)
    k, v, gate, documents = run.value(memory)
    rows = k.shape[2]
    last = run.domain.q_offset + q.shape[2] - memory.delay
    if documents is None and 0 < last < rows and not run.call.needs_grad:
        # No query sees a later key. In a step of decoding that is all but one of the kept tokens, and the state before them is wanted.
        rows = last
        k, v, gate = (x[:, :, :rows] for x in (k, v, gate))
    out, lse, state = run.dispatch.slots(
        q, k, v, gate, delay=memory.delay, temperature=memory.temperature, scale=run.scale(node.scale, q), empty=memory.empty,
        q_offset=run.domain.q_offset, state=run.call.state_of(node), documents=documents,
    )  # fmt: skip
    run.after[node] = rows, state
    return out, lse


def _linear(run: Lowering, node: Linear) -> Result:
    found = run_linear(node, run.call, run.dispatch, run.value, state=run.call.state_of(node))
    run.after[node] = run.call.k.shape[2], found.state
    return found.out, found.lse


# ---- combinations --------------------------------------------------------------------------------------------------------------


def _joint(run: Lowering, node: Joint) -> Result:
    return lse_merge([run.value(branch) for branch in node.branches])


def _mix(run: Lowering, node: Mix) -> Result:
    weights, parts = run.value(node.weights), [run.value(branch)[0] for branch in node.branches]
    if wants_grad(weights, *parts) or transforms_active() or [part for part in parts if part.dtype is not weights.dtype]:
        return torch.stack([weights[..., i, None] * part for i, part in enumerate(parts)]).sum(0), None
    shares = weights[..., None].unbind(3)
    out = shares[0] * parts[0]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        out.addcmul_(share, part)
    return out, None


def _compact(run: Lowering, node: Compact) -> Result:
    given, wanted, length = [run.value(x) for x in node.inputs[1:]], node in run.weighed, run.call.q.shape[2]
    pattern = _mask_alone(node.inside) if run.dispatch.follows_places(run.call.q) else None
    outs: list[Tensor] = []
    lses: list[Tensor | None] = []
    for entry, index in enumerate(run.value(node.tokens)):
        q, k, v = (x[entry : entry + 1] for x in given)
        lse: Tensor | None = None
        if not index.numel():  # nothing was kept
            out = q.new_zeros((*q.shape[:3], v.shape[3]))
            lse = q.new_full(q.shape[:3], NEVER, dtype=run.call.dtype)
        elif pattern is not None:
            tables = {name: run.call.tables[name] for name in pattern.tables}
            places = Places(index[None], index[None])
            out, lse = run.dispatch.attend(pattern, q, k, v, tables, q_offset=0, scale=run.call.scale, lse=wanted, places=places)
        else:
            inner = (gather_rows(x, index[None]) for x in (q, k, v))
            out, lse = run.again(run.call.inside(node.inside, *inner), lse=wanted)
            out = scatter_rows(out, index[None], length)
            lse = None if lse is None else scatter_rows(lse, index[None], length, NEVER)
        outs.append(out)
        lses.append(lse)
    known = [lse for lse in lses if lse is not None]
    return _joined(outs), _joined(known) if len(known) == len(lses) else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mask_alone(inside: Branch) -> Pattern | None:
    """The pattern of attention of q to k and v over a mask that reads tables alone; None of anything else."""
    if not isinstance(inside, Attend) or inside.normaliser is not None:
        return None
    if not (inside.x is tensors.q and inside.y is tensors.k and inside.z is tensors.v):
        return None
    return None if any(isinstance(value, Node) for value in inside.pattern.bound.values()) else inside.pattern


LOWERED_RULES: Rules[Rule] = Rules(
    "the lowering",
    {
        Input: _input,
        Summary: _summary,
        Take: _take,
        **SCORE_RULES,
        **LISTED_RULES,
        Attend: attend_node,
        Slots: _slots,
        Recall: _recall,
        Linear: _linear,
        Joint: _joint,
        Mix: _mix,
        Compact: _compact,
    },
)
