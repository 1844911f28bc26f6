"""Which pages of its keys an attention of a program looks at: those that attend in any case, and those of the blocks that were chosen."""

from __future__ import annotations

import sympy
import torch

from sparsedsl.execute.lowering import Lowering, reads_nodes
from sparsedsl.execute.mask_split import MaskSplit
from sparsedsl.lang.expressions import Mask
from sparsedsl.program.branches import Attend, blocks_of_keys
from sparsedsl.runtime.packed_rows import Requests
from sparsedsl.runtime.seen_pages import seen_pages

__all__ = ["pages_seen"]

Tensor = torch.Tensor


def pages_seen(run: Lowering, node: Attend, parts: MaskSplit, page: int) -> Tensor | None:
    """Flags of the pages of ``page`` keys that some query of some head sees, in a call of one batch entry; None: it may be all."""
    mask = Mask(parts.static, node.pattern.mask.bound)
    if blocks_of_keys(node) != 1 or reads_nodes(mask):
        return None
    domain = run.domain
    width = -(-domain.kv_len // page)
    ends = torch.zeros(width + 1, dtype=torch.int64)
    if parts.static != sympy.false:
        starts, kv_lens = torch.tensor([domain.q_offset]), torch.tensor([domain.kv_len])
        requests = Requests(torch.tensor([0, domain.rows]), starts, kv_lens, domain.rows, True)
        tables = {name: run.call.tables[name].cpu() for name in mask.tables}
        ends[:-1] += seen_pages(mask, requests, page, width, domain.heads, tables)[0]
    seen = ends[:-1] > 0
    for choice in parts.choices if parts.selected != sympy.false else ():
        lists = run.value(choice)
        # Adds 1 where the pages of a block begin, and takes 1 off behind its last.
        steps = torch.zeros(width + 1, dtype=torch.int64)
        chosen = lists.indices[lists.indices >= 0].cpu().long()
        last = ((chosen + 1) * lists.kv_block).clamp(max=domain.kv_len) - 1
        one = torch.ones_like(chosen)
        steps.index_add_(0, chosen * lists.kv_block // page, one).index_add_(0, last // page + 1, -one)
        seen |= steps.cumsum(0)[:-1] > 0
    return seen
