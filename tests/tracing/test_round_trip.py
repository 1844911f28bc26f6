"""Traced, printed as FlexAttention functions, and run again: the generated functions do what the user's own did."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sparsedsl.codegen.to_flex import flex_functions
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
