"""The sparse prefill example, on a model with random weights: what it measures is what it says it measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsedsl as sd


@pytest.fixture
def example(example_modules: Any, tiny_gemma: Any) -> SimpleNamespace:
    kept = tiny_gemma()
    names = ("parts.gemma", "parts.after_prompt", "parts.sparse_prefill_picture", "gemma_sparse_prefill")
    found: SimpleNamespace = example_modules(*names, load=lambda: kept)
    found.model, found.tokenizer = kept
    return found


def test_density_counts_the_pairs_that_choices_leave(example: SimpleNamespace) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 600, 16), torch.randn(1, 2, 600, 16), torch.randn(1, 2, 600, 16)
    density, pairs = example.after_prompt.density, 4 * 600 * 601 / 2
    assert density(sd.patterns.causal(), q, k, v) == pytest.approx(1)
    assert density(sd.patterns.sliding_window(3), q, k, v) == pytest.approx((600 * 3 - 3) / (600 * 601 / 2))

    tsa = sd.patterns.token_sparse(0.5, probe=32, min_tokens=64)
    (kept,) = (value for value in sd.compile(tsa, backend="tiled").choices(q, k, v).values() if isinstance(value, list))
    count = kept[0].shape[1]
    assert 96 <= count < 600
    assert density(tsa, q, k, v) == pytest.approx(count * (count + 1) / (600 * 601))

    pbs = sd.patterns.pbs(32, 64, 0.5)
    chosen = sd.compile(pbs, backend="tiled").choices(q, k, v)
    places, selected = (next(value for label, value in chosen.items() if label.startswith(word)) for word in ("inverse", "top_p"))
    table = selected.table().clone()
    table[:, torch.arange(4), :, places[0, :, 0] // 32] = True  # the block with the first token
    rows, columns = torch.arange(19)[:, None], torch.arange(19)
    table &= columns // 2 < rows // 2
    height = torch.full((19,), 32.0)
    height[-1] = 600 - 18 * 32
    own = sum(n * (n + 1) / 2 for n in [64] * 9 + [24])
    wanted = (table.double() * height[:, None] * 32).sum() + 4 * own
    assert density(pbs, q, k, v) == pytest.approx(wanted.item() / pairs)
    assert density(pbs, q, k, v) < 0.8


def test_texts_have_their_length_and_their_facts(example: SimpleNamespace) -> None:
    first, second = example.after_prompt.texts(example.model, example.tokenizer, 900, 2, 3, 100)
    for text in (first, second):
        assert text.prompt.shape == (1, 900) and text.prompt[0, 0] == 2 and text.following.shape == (1, 100)
        words = bytes(text.prompt[0, 1:].tolist()).decode()
        for question, answer in text.asked:
            fact = bytes(question[0].tolist()).decode().strip().removeprefix("The")
            assert words.count(f"{fact} {bytes(answer[0].tolist()).decode()}") == 2
    assert not torch.equal(first.prompt, second.prompt)


def test_what_follows_is_judged_as_one_forward_would(example: SimpleNamespace) -> None:
    parts, model = example.after_prompt, example.model
    ids = torch.randint(3, 256, (1, 150), generator=torch.Generator().manual_seed(0))
    state = parts.read(model, ids[:, :120], "read")
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    for count in (30, 7):
        wanted = torch.nn.functional.cross_entropy(logits[-count:], ids[0, -count:], reduction="sum").item()
        (loss, hits), _ = parts.judged(model, state, [ids[:, 120:], ids[:, 110:140]], count)
        assert loss == pytest.approx(wanted, rel=1e-4)
        assert hits == int((logits[-count:].argmax(-1) == ids[0, -count:]).sum())


def test_watching_sees_every_layer_and_goes_away(example: SimpleNamespace) -> None:
    parts, model, seen = example.after_prompt, example.model, []
    ids = torch.randint(3, 256, (1, 100))
    with torch.no_grad():
        with sd.models.apply(model, {5: sd.patterns.pbs(16, 32)}):
            with parts.watching(model, lambda layer, q, k, v, seconds: seen.append((layer, q.shape, k.shape))):
                model(ids)
            model(ids)
        model(ids)
    assert seen == [(layer, (1, 2, 100, 16), (1, 1, 100, 16)) for layer in range(6)]


def test_it_runs_as_a_whole(example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "a" / "curve.png", tmp_path / "b" / "numbers.json"
    assert example.gemma_sparse_prefill.main(["--quick", "--picture", str(picture), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Layers [5] of 6 see everything. 1,024 tokens" in shown
    found = json.loads(out.read_text())
    full, *sparse = found["quality"]
    assert full["density"] == pytest.approx(1) and full["after"][2] == 3 and full["within"][2] == 1
    assert [row["method"] for row in sparse] == ["PBS", "TSA", "TSA + PBS"]
    assert all(row["density"] < 0.99 for row in sparse)
    assert set(found["times"]) == {"full, torch's own", "full", "PBS", "TSA", "TSA + PBS"}
    assert picture.stat().st_size > 10_000
