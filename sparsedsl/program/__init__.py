"""Programs: attention that chooses, reorders, remembers and combines, as a graph of frozen nodes.

What the nodes are for, one after the other in the modules: ``tensors`` (inputs, summaries), ``score_values`` and ``scores`` (cheap scores,
and what is made of them), ``select`` (choices), ``given_blocks`` (choices made elsewhere), ``key_choices`` (of keys, for all queries of
a head), ``orders`` (sorts, subsets), ``sources`` (slots, weights of chunks), ``branches`` (attention and its combinations),
``recurrences`` (linear attention), ``decided`` (candidates), ``graph`` (the whole), ``rules`` (tables with a rule for every kind of
node), ``text``, ``effects`` (what a program does beside computing), ``kinds`` (every kind described), ``decays`` (data of Ring models).
"""

from __future__ import annotations

from sparsedsl.program.branches import attend, compact, joint, mix, recall
from sparsedsl.program.decays import decay_table, schedule
from sparsedsl.program.given_blocks import given
from sparsedsl.program.graph import Program
from sparsedsl.program.key_choices import diagonals, divergence
from sparsedsl.program.orders import keep_tokens, segment_sort, take
from sparsedsl.program.recurrences import linear
from sparsedsl.program.scores import antidiagonal, bound, dot, given_key_scores, given_scores, probe, smooth
from sparsedsl.program.select import threshold, top_k, top_p
from sparsedsl.program.sources import per_chunk, slots
from sparsedsl.program.tensors import input, k, q, summary, v

__all__ = [
    "Program",
    "antidiagonal",
    "attend",
    "bound",
    "compact",
    "decay_table",
    "diagonals",
    "divergence",
    "dot",
    "given",
    "given_key_scores",
    "given_scores",
    "input",
    "joint",
    "k",
    "keep_tokens",
    "linear",
    "mix",
    "per_chunk",
    "probe",
    "q",
    "recall",
    "schedule",
    "segment_sort",
    "slots",
    "smooth",
    "summary",
    "take",
    "threshold",
    "top_k",
    "top_p",
    "v",
]
