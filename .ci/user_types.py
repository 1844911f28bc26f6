"""What type checkers see of a user's code: mypy reads this file with all others (``check_types.py``), nothing runs it."""

from __future__ import annotations

from typing import assert_type

import sparsedsl as sd
from sparsedsl.analysis.program_report import ProgramAnalysis
from sparsedsl.program.branches import Attend, Compact
from sparsedsl.program.scores import Grouped, GroupedKeys

doc = sd.table("doc", monotone=True)
means = sd.summary(sd.k, 64)
selected = sd.top_k(sd.dot(sd.q, means), 4)
causal = sd.kv_idx <= sd.q_idx

assert_type(2 * (sd.q_idx - sd.kv_idx) + 1, sd.Index)
assert_type(sd.q_idx * 0.5, sd.Score)
assert_type(-abs(sd.q_idx - sd.kv_idx) // 4, sd.Index)
assert_type(sd.score - 2.0**-sd.h * sd.q_idx, sd.Score)
assert_type(causal & (sd.q_idx - sd.kv_idx < 512), sd.Mask)
assert_type(doc[sd.q_idx] == doc[sd.kv_idx], sd.Mask)
assert_type(doc[sd.q_idx], sd.Index)
assert_type(sd.table("allowed", dtype=bool)[sd.q_idx, sd.kv_idx], sd.Mask)
assert_type(sd.table("bias", learned=True)[sd.h], sd.Score)
assert_type(sd.minimum(sd.q_idx, 3), sd.Index)
assert_type(sd.where(causal, sd.score, float("-inf")), sd.Score)
assert_type(causal.bind(doc=[1, 2]), sd.Mask)

assert_type(sd.mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx), sd.Mask)
assert_type(sd.attend(causal, causal=True), sd.Pattern | Attend)

assert_type(causal & selected, sd.Mask)
assert_type(selected | causal, sd.Mask)
assert_type(sd.dot(sd.q, means).over_group(), Grouped)
assert_type(sd.probe(sd.q, sd.k, rows=64).over_heads(), GroupedKeys)
assert_type(sd.attend(causal & selected), sd.Pattern | Attend)
assert_type(sd.attend(causal & selected, normaliser=sd.per_chunk(selected)), Attend)
assert_type(sd.patterns.token_sparse(), Compact)

assert_type(sd.analyse(sd.patterns.gemma2(0), 64), sd.Analysis)
assert_type(sd.analyse(sd.patterns.hsa(), 64), ProgramAnalysis)
assert_type(sd.implies(causal, True), sd.Verdict)
assert_type(sd.schedule(4, 2, full=causal, other=lambda layer: causal), dict[int, sd.Mask])
