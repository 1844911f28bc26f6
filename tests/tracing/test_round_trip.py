"""Traced, printed as FlexAttention functions, and run again: the generated functions do what the user's own did."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sparsedsl.analysis.bounds import check_reads
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.intervals import wrapped
from sparsedsl.codegen.to_flex import flex_functions
from sparsedsl.errors import TableError
from sparsedsl.lang.pattern import attend
from sparsedsl.tracing import trace_mask, trace_score


def families(file: str) -> dict:
    """The table of callables in another test file."""
    spec = importlib.util.spec_from_file_location(file, Path(__file__).with_name(f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAMILIES


MASKS, SCORES = families("test_mask_families"), families("test_score_families")


def generated(pattern, shape):
    """``(mask_mod, score_mod)`` from the pattern's source."""
    source, names = flex_functions(pattern), {}
    exec(source.text, names)
    known = {"q_offset": 0, "q_len": shape[2], "kv_len": shape[3], **pattern.bound}
    return names["mods"](*(torch.as_tensor(known[value]).detach() for value in source.values))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, run_by_torch):
    shape = (2, 3, 12, 17)
    mask_mod, _ = generated(attend(trace_mask(MASKS[name])), shape)
    assert torch.equal(run_by_torch(mask_mod, shape), run_by_torch(MASKS[name], shape))


@pytest.mark.parametrize("name", SCORES)
def test_scores(name, run_by_torch):
    shape = (2, 3, 12, 17)
    logits = torch.randn(shape)
    _, score_mod = generated(attend(True, score=trace_score(SCORES[name])), shape)
    if score_mod is None:
        assert name == "identity"
        return
    got, wanted = run_by_torch(score_mod, shape, logits), run_by_torch(SCORES[name], shape, logits)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("size", [1, 5, 9])
def test_range_of_an_index_that_counts_from_the_end(size):
    """The narrowest range, for numbers and for many boxes at once."""
    ends = torch.arange(-12, 13)
    low, high = (x.reshape(-1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    low, high = low[low <= high], high[low <= high]
    many = torch.stack(wrapped((low, high), size), 1).tolist()
    for a, b, found in zip(low.tolist(), high.tolist(), many, strict=True):
        values = [i + size if i < 0 else i for i in range(a, b + 1)]
        assert found == [min(values), max(values)] == list(wrapped((a, b), size))


def test_indices_that_may_be_negative_are_proved_to_lie_inside():
    """An index that counts from the end, or comes out of exact float arithmetic, is looked through or worked out."""

    def check(mask_mod, score_mod, length):
        pattern = attend(trace_mask(mask_mod), score=trace_score(score_mod))
        check_reads(pattern, Domain(length, length, heads=3, tables=pattern.bound))

    everything, causal = (lambda b, h, q, kv: True), MASKS["causal"]
    near = MASKS["sliding"]  # 4 keys
    ring, few = torch.randn(3, 64), torch.randn(4)
    for mask, score, length in [
        (everything, SCORES["T5, both ways"], 50_000),
        (everything, SCORES["relative table"], 32),
        (everything, lambda s, b, h, q, kv: s + ring[h, q - kv], 64),
        (near, lambda s, b, h, q, kv: s + few[q - kv], 50_000),
        (causal, lambda s, b, h, q, kv: s + ring[h, torch.sqrt((q - kv).float()).long()], 4000),
        (causal, lambda s, b, h, q, kv: s + few[torch.sqrt((q * kv % 16).float()).long()], 300),
    ]:
        check(mask, score, length)
    for mask, score, length in [
        (everything, SCORES["relative table"], 34),
        (everything, lambda s, b, h, q, kv: s + ring[h, q - kv], 66),
        (near, lambda s, b, h, q, kv: s + few[q - kv + 1], 50_000),
        (causal, lambda s, b, h, q, kv: s + ring[h, torch.sqrt((q - kv).float()).long()], 4097),
        (causal, lambda s, b, h, q, kv: s + few[torch.sqrt((q * kv % 17).float()).long()], 300),
    ]:
        with pytest.raises(TableError, match="is too short"):
            check(mask, score, length)
