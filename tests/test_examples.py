"""Every example tells one story, has its line on the page of examples, runs on CPU from another folder, and ends well."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from source_tree import ROOT

EXAMPLES = ROOT / "examples"
# What needs 240 MB of weights, and what tests it here with a model of random ones.
ELSEWHERE = {
    "gemma_hybrid.py": "tests/models/test_example.py; make demo runs it",
    "gemma_finetune.py": "below",
    "gemma_conversion.py": "tests/models/test_conversion_example.py",
    "gemma_sparse_prefill.py": "tests/models/test_sparse_prefill.py",
    "gemma_search.py": "tests/models/test_search_example.py",
}
# What trains for minutes; a few steps here.
QUICK = {"hsa_needle.py", "nha_window.py", "ring_schedule.py", "train_context_parallel.py"}
STORIES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_examples_are_found():
    assert "declare_and_inspect.py" in STORIES and set(ELSEWHERE) | QUICK < set(STORIES)


def test_every_example_has_its_line_on_the_page_and_no_other_has_one():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\w+\.py)\]\(\.\./examples/\1\) \|", page, re.MULTILINE)) == STORIES


@pytest.mark.parametrize("name", [name for name in STORIES if name not in ELSEWHERE])
def test_example_runs(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name), *(["--quick"] if name in QUICK else [])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), f"{name} says nothing"


@pytest.mark.campaign
def test_context_parallel_trains_under_torchrun(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(EXAMPLES / "train_context_parallel.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # It ends with an error where ranks do not train as one process does.
    assert done.stdout.count("in one process; gradients differ by") == 2


@pytest.mark.parametrize("name", STORIES)
def test_example_asks_one_question_and_says_how_to_run_it(name):
    first, *_ = source = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert first.startswith('"""') and first.endswith("?")
    assert any(line.strip().startswith(f"python examples/{name}") for line in source)


@pytest.fixture
def finetune(monkeypatch, tiny_gemma):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("examples_gemma_finetune", EXAMPLES / "gemma_finetune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = tiny_gemma()
    monkeypatch.setattr(module.gemma, "load", lambda: kept)
    module.kept = kept
    return module


@pytest.mark.parametrize(
    "extra", [[], ["--checkpointing"], ["--native", "--layers", "2"]], ids=["hybrid", "checkpointing", "native"]
)
def test_finetuning_lowers_the_loss_on_unseen_text(finetune, capsys, extra):
    model = finetune.kept[0]
    before = [weight.detach().clone() for weight in model.parameters()]
    assert finetune.main(["--steps", "3", "--tokens", "600", "--learning-rate", "1e-2", *extra]) == 0
    shown = capsys.readouterr().out
    assert "held-out loss before: 5." in shown
    assert ", down by " in shown
    layers = {id(weight) for weight in model.model.layers.parameters()}
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    trained = [id(weight) in layers for weight in model.parameters()]
    assert not any(c and not t for c, t in zip(changed, trained, strict=True)), "frozen weights have moved"
    assert model.model.embed_tokens.weight.grad is None, "gradients that nobody uses"
    assert sum(changed) >= (0.9 if "--layers" not in extra else 0.25) * sum(trained)


def test_finetuning_loss_in_chunks_is_the_loss(finetune):
    model = finetune.kept[0]
    ids = torch.randint(0, 256, (1, 601), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        assert torch.allclose(finetune.loss(model, ids), wanted, rtol=1e-5)
