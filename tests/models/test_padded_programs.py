"""Padding means nothing to a program: it chooses among the real tokens of each row, or of each packed sequence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import sparsedsl as sd
from sparsedsl import b, kv_idx, q_idx
from sparsedsl.models import left_padding
from sparsedsl.program.in_layers import is_for_prefill
from sparsedsl.program.relocation import reads_rows
from tests.models.families import build, tokens
from tests.models.rows import (
    alone,
    assert_generates_as_if_alone,
    assert_gradients_as_if_alone,
    assert_rows_as_if_alone,
    batch,
    exact,
    in_parts,
    logits,
    named,
    padded,
    tolerance,
)

causal = kv_idx <= q_idx
near = q_idx - kv_idx < 3
own_page = q_idx // 4 == kv_idx // 4
even = sd.table("even", dtype=bool)
PROGRAMS: dict[str, Any] = {
    "moba": sd.patterns.moba(chunk=4, top_k=2),
    "quest": sd.attend(causal & sd.top_k(sd.bound(sd.q, sd.k, 4), 2, forced=own_page, extra=True)),
    "ring": sd.patterns.ring_linear([0.5, 0.7, 0.9, 0.99]),
    "nha": sd.patterns.nha(4, window=None),
    "pbs": sd.patterns.pbs(block=4, segment=8, mass=0.5),
    "token_sparse": sd.patterns.token_sparse(coverage=0.3, probe=4, pool=3, min_tokens=8),
    "both": sd.joint(causal & near, causal & ~near & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 1)),
}
ALWAYS = [name for name in PROGRAMS if not is_for_prefill(sd.Program(PROGRAMS[name]))]
LAYOUTS = ["left", "right", "both", "holes", "packed"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_row_gives_what_it_gives_alone(name: str) -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, PROGRAMS[name], backend="reference"):
        assert_rows_as_if_alone(model, rows, LAYOUTS)


@pytest.mark.parametrize("name", ["moba", "ring", "pbs"])
def test_tiled_too(name: str) -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, PROGRAMS[name], backend="tiled"):
        assert_rows_as_if_alone(model, rows, ["left", "holes", "packed"])


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "granite"])
def test_scale_cap_and_sinks_of_the_layer_stay(family: str) -> None:
    """GPT-OSS makes its masks without ``position_ids``: to it, a packed row is one sequence."""
    model, rows = exact(family), alone()
    with sd.models.apply(model, PROGRAMS["moba"], backend="reference"):
        assert_rows_as_if_alone(model, rows, [layout for layout in LAYOUTS if (family, layout) != ("gpt_oss", "packed")])


def test_what_a_padding_query_gives_is_zero() -> None:
    model, rows, seen = build("llama"), alone(), []
    inputs, real = batch(rows, "left")
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with sd.models.apply(model, PROGRAMS["moba"], backend="reference"):
        logits(model, **inputs)
    hook.remove()
    assert seen[0][~real].eq(0).all() and seen[0][real].ne(0).any(-1).all()


def test_what_a_mask_says_of_rows_it_says_of_rows_of_the_batch() -> None:
    """Rows of one length run together, and packed ones as rows of their own: ``b`` is none of theirs."""
    table = torch.arange(4 * 30).view(4, 30) % torch.tensor([2, 3, 5, 7])[:, None] != 1
    choice = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2, among=causal)
    program = sd.attend(causal & (choice | (b == 2)) & (even[b, kv_idx - left_padding[b]] | (q_idx == kv_idx)).bind(even=table))
    assert reads_rows(sd.Program(program)) and not reads_rows(sd.Program(PROGRAMS["pbs"]))
    model, rows = exact("llama"), alone((20, 12, 8, 12))  # whole chunks, whose means what follows does not move
    together = torch.cat([torch.nn.functional.pad(row, (0, 20 - row.shape[1]), value=4) for row in rows])
    inputs, real = batch(rows, "left")
    with sd.models.apply(model, program, backend="reference"):
        unpadded = logits(model, input_ids=together)  # causal: what follows a row is as good as padding
        got = logits(model, **inputs)[real]
    wanted = torch.cat([one[: row.shape[1]] for one, row in zip(unpadded, rows, strict=True)])
    torch.testing.assert_close(got, wanted, atol=tolerance(model, rows), rtol=0)


# ---- through caches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_chunks_and_single_tokens(name: str, static: bool) -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, PROGRAMS[name], backend="reference") as applied:
        wanted = torch.cat([logits(model, input_ids=row)[0] for row in rows])
        for layout in ["left", "right", "holes"]:
            inputs, real = batch(rows, layout)
            cache = StaticCache(config=model.config, max_cache_len=40) if static else applied.cache()
            got = in_parts(model, inputs, [5, 1, 12, 1, 1, 7], cache)[real]
            torch.testing.assert_close(got, wanted, atol=tolerance(model, rows), rtol=0, msg=named(layout))


@pytest.mark.parametrize("name", ["pbs", "token_sparse"])
def test_what_is_for_prompts_asks_each_row_whether_its_prompt_is_whole(name: str) -> None:
    """The second chunk is all that one row has; it continues the other, which the native pattern reads."""
    model, (late, early) = exact("llama"), alone((14, 23))
    inputs = padded([late, early], torch.stack([torch.arange(23) >= 9, torch.ones(23, dtype=torch.bool)]))
    with sd.models.apply(model, PROGRAMS[name], backend="reference") as applied:
        first, second = in_parts(model, inputs, [9, 14], applied.cache()).split([9, 14], dim=1)
        whole = logits(model, input_ids=late)
        cache = applied.cache()
        parts = [logits(model, input_ids=part, past_key_values=cache, use_cache=True) for part in early.split([9, 14], dim=1)]
    size = tolerance(model, [late, early])
    for got, wanted in ((second[:1], whole), (first[1:], parts[0]), (second[1:], parts[1])):
        torch.testing.assert_close(got, wanted, atol=size, rtol=0)
    assert (logits(model, input_ids=late) - whole).abs().max() > 10 * size, "sparse enough to show"


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_goes_on_as_each_row_alone(name: str, how: dict[str, Any]) -> None:
    model = exact("llama")
    with sd.models.apply(model, PROGRAMS[name], backend="reference"):
        assert_generates_as_if_alone(model, alone(), 6, **how)


@pytest.mark.parametrize("name", ["moba", "pbs"])
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_generate_in_layers_with_windows(family: str, name: str) -> None:
    model = exact(family)
    with sd.models.apply(model, PROGRAMS[name], backend="reference"):
        assert_generates_as_if_alone(model, alone(), 12)


# ---- graphs and folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", ["tokens", "slots", "program"])
def test_one_graph_counts_as_the_model_does(indices: str) -> None:
    model, rows = build("llama"), alone()
    inputs, real = batch(rows, "left")
    given, how = (PROGRAMS["moba"], {}) if indices == "program" else (causal & (near | (kv_idx < 2)), {"indices": indices})
    with sd.models.apply(model, given, backend="reference", **how):
        wanted = logits(model, **inputs)
        torch._dynamo.reset()
        got = logits(torch.compile(model, backend="eager", fullgraph=True), **inputs)
        torch._dynamo.reset()
    torch.testing.assert_close(got[real], wanted[real], atol=3e-5, rtol=0)


def test_a_saved_model_knows_what_its_indices_count(tmp_path: Path) -> None:
    model, (inputs, real) = build("llama"), batch(alone(), "left")
    found = {}
    for indices in ("tokens", "slots"):
        with sd.models.apply(model, causal & (near | (kv_idx < 2)), backend="reference", indices=indices):
            found[indices] = logits(model, **inputs)[real]
            model.save_pretrained(tmp_path / indices)
        loaded = sd.models.from_pretrained(tmp_path / indices)
        assert torch.equal(logits(loaded, **inputs)[real], found[indices])
    assert (found["tokens"] - found["slots"]).abs().max() > 0.01


# ---- training ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("layout", ["left", "holes", "packed"])
def test_gradients_are_those_of_the_rows_alone(layout: str, name: str) -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, PROGRAMS[name], backend="reference", allow=["selection reads later queries"]):
        assert_gradients_as_if_alone(model, rows, layout)


# ---- refusals ------------------------------------------------------------------------------------------------------------------------


def test_slots_mean_nothing_to_a_program() -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, {1: PROGRAMS["moba"]}, backend="reference", indices="slots"):
        assert_rows_as_if_alone(model, rows, ["packed"])
        with pytest.raises(sd.UnsupportedError, match=r"layer 1: the batch has padding, and a program .*indices='tokens'"):
            logits(model, **batch(rows, "left")[0])


def test_a_mask_of_tokens_that_the_model_has_not_seen_is_refused() -> None:
    model, ids = build("llama"), tokens(2, 21)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :3] = 0
    with sd.models.apply(model, PROGRAMS["moba"], backend="reference"):
        cache = StaticCache(config=model.config, max_cache_len=30)
        message = r"slots from 9 on hold tokens, which the model has not seen.*cut it .* attention_mask\[:, :9\]"
        with pytest.raises(sd.UnsupportedError, match=message):
            logits(model, input_ids=ids[:, :9], attention_mask=mask, past_key_values=cache, use_cache=True)
        cut = {"input_ids": ids[:, :9], "attention_mask": mask[:, :9], "use_cache": True}
        one, other = (logits(copy.deepcopy(model), **cut, past_key_values=StaticCache(config=model.config, max_cache_len=30)),
                      logits(model, **{**cut, "use_cache": False}))  # fmt: skip
    torch.testing.assert_close(one, other)


def test_a_cache_that_has_dropped_real_tokens_is_refused() -> None:
    model, ids = build("mistral"), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    with sd.models.apply(model, PROGRAMS["moba"], backend="reference"):
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(sd.UnsupportedError, match=r"layer 0: its cache has dropped the keys .*handle.cache\(\)"):
            logits(model, input_ids=ids[:, :1], attention_mask=torch.ones(2, 31), past_key_values=cache, use_cache=True)
