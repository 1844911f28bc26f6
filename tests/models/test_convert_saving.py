"""Converted models in folders: saved, loaded in another process, and what is refused on the way."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import sparsedsl as sd
from sparsedsl.models.registry import NOTE
from tests.models.families import left_padded, tokens
from tests.models.hybrid_models import HSA, LAYERS, MOBA, NHA, convert, donor, spread

ROOT = Path(__file__).parents[2]


def logits(model: Any, *ids: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(*ids, **words).logits
    return found


def test_another_process_computes_the_same_bits(tmp_path: Path) -> None:
    """Logits, and a step of training."""
    model, ids = donor("llama", torch.float32), tokens()
    handle = convert(model, {0: NHA, 1: HSA}, backend="tiled")
    spread(handle)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)[NOTE]["layers"]["0"] == {
        "class": "NHA",
        "program": handle.layers[0].program.text,
        "arguments": {"slots": 3, "window": 4},
    }
    step = """
import sys, torch, sparsedsl as sd
from tests.models.families import tokens
model = sd.models.from_pretrained(sys.argv[1], backend="tiled")
before = model(tokens()).logits.detach()
optimizer = torch.optim.SGD(sd.models.conversion(model).parameter_groups(0.1, donor_lr=0.1, weight_decay=0.0), lr=0.1)
model(tokens(), labels=tokens()).loss.backward()
optimizer.step()
torch.save([before, model(tokens()).logits.detach()], sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", step, str(tmp_path), str(tmp_path / "out.pt")], check=True, cwd=ROOT)
    found = torch.load(tmp_path / "out.pt")
    assert torch.equal(found[0], logits(model, ids))
    optimizer = torch.optim.SGD(handle.parameter_groups(0.1, donor_lr=0.1, weight_decay=0.0), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(found[1], logits(model, ids))


def test_a_pickled_model_runs_in_a_process_that_has_converted_nothing(tmp_path: Path) -> None:
    """With padding, which only a mask with a request says."""
    model, padded = donor("llama", torch.float32), left_padded()
    convert(model, {1: NHA}, backend="tiled")
    torch.save((model, padded), tmp_path / "model.pt")
    step = """
import sys, torch
model, padded = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save(model(**padded).logits, sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", step, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")], check=True, cwd=ROOT)
    real = padded["attention_mask"].bool()
    assert torch.equal(torch.load(tmp_path / "out.pt")[real], logits(model, **padded)[real])


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_comes_back(kind: str, tmp_path: Path) -> None:
    model, ids = donor("llama", torch.float32), tokens()
    spread(convert(model, {1: LAYERS[kind]}))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = sd.models.from_pretrained(tmp_path, backend="tiled")
    assert repr(sd.models.conversion(again)) == repr(sd.models.conversion(model))
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_programs_and_half_precision_come_back(tmp_path: Path) -> None:
    ids = tokens()
    donor("llama", torch.float32).save_pretrained(tmp_path / "donor")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "donor", dtype=torch.bfloat16)
    handle = convert(model, {0: sd.patterns.ring_linear([0.5] * 4), 1: NHA})
    spread(handle)
    model.save_pretrained(tmp_path)
    again = sd.models.from_pretrained(tmp_path, backend="tiled", dtype=torch.bfloat16)
    own = sd.models.conversion(again)
    assert own is not None
    assert {p.dtype for p in own.new_parameters()} == {torch.float32}
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """New parameters move, the donor's do not, and its checkpoint is a folder like any other."""
    model, ids = donor("llama", torch.float32), tokens(4, 12)
    handle = convert(model, {1: NHA})
    spread(handle)
    handle.freeze()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sizes: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **sizes)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".sd_layer." not in name)
    again = sd.models.from_pretrained(tmp_path / "checkpoint-2", backend="tiled")
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))


def test_patterns_and_layers_come_back_together(tmp_path: Path) -> None:
    model, ids = donor("gemma3", torch.float32), tokens()
    handle = convert(model, {0: sd.patterns.sliding_window(4), 1: NHA})
    spread(handle)
    model.save_pretrained(tmp_path)
    again = sd.models.from_pretrained(tmp_path, backend="tiled")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert [sorted(applied.patterns) for applied in sd.models.applied(again)] == [[0]]
    handle.restore()
    assert NOTE not in vars(model.config) and "sparsedsl" not in vars(model.config)


def test_plain_transformers_load_the_donor(tmp_path: Path) -> None:
    model, ids = donor("llama", torch.float32), tokens()
    expected = logits(model, ids)
    convert(model, {1: NHA})
    model.save_pretrained(tmp_path)
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(plain.eval(), ids), expected)
    assert sorted(key.rpartition("sd_layer.")[2] for key in info["unexpected_keys"]) == [
        "sd_gate.bias",
        "sd_gate.weight",
        "slot_bias",
    ]


class Custom(sd.models.NHA):
    """A user's class."""


def test_classes_of_users_are_registered(tmp_path: Path) -> None:
    model, ids = donor("llama", torch.float32), tokens()
    convert(model, {1: functools.partial(Custom, slots=3, window=4)})
    model.save_pretrained(tmp_path)
    with pytest.raises(sd.UnsupportedError, match=r"layer 1 is a '.*\.Custom', which is not registered here"):
        sd.models.from_pretrained(tmp_path, backend="tiled")
    sd.models.register_layer(Custom)
    assert torch.equal(logits(sd.models.from_pretrained(tmp_path, backend="tiled"), ids), logits(model, ids))
    with pytest.raises(sd.PatternError, match=r"takes a subclass of .*; got 3"):
        sd.models.register_layer(3)  # type: ignore[type-var]
    with pytest.raises(sd.PatternError, match="'NHA' is the name of"):
        sd.models.register_layer(Custom, "NHA")


def test_layers_that_cannot_come_back_say_so(tmp_path: Path) -> None:
    keep = sd.table("keep", dtype=bool)
    bound = (sd.patterns.sliding_window(4) & keep[sd.kv_idx]).bind(keep=torch.ones(64, dtype=torch.bool))
    model = donor("llama", torch.float32)
    program = sd.joint(bound, sd.patterns.sinks(1) & (sd.q_idx - sd.kv_idx >= 4))
    with pytest.warns(
        UserWarning, match="layer 1 .Given. could not be loaded again if it were saved: its program has tensors bound to keep"
    ):
        convert(model, {1: program})
    model.save_pretrained(tmp_path)
    with pytest.raises(sd.UnsupportedError, match="cannot be made again: its program has tensors bound to keep"):
        sd.models.from_pretrained(tmp_path, backend="tiled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda note: note.update(version=2), "reads version 1"),
        (lambda note: note["layers"]["1"]["arguments"].update(slots=5), "makes another program now"),
        (lambda note: note["layers"]["1"]["arguments"].update(extra=5), "takes no extra"),
        (lambda note: note["layers"].update({"0": note["layers"].pop("1")}), "lack model.layers.0.self_attn.sd_layer"),
    ],
)
def test_folders_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    model = donor("llama", torch.float32)
    convert(model, {1: NHA})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config[NOTE])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sd.SparseDSLError, match=message):
        sd.models.from_pretrained(tmp_path, backend="tiled")


def test_folders_without_layers(tmp_path: Path) -> None:
    model = donor("llama", torch.float32)
    handle = convert(model, {1: MOBA})
    handle.restore()
    model.save_pretrained(tmp_path)
    assert NOTE not in (tmp_path / "config.json").read_text()
    with pytest.raises(sd.PatternError, match="without converted layers"):
        sd.models.from_pretrained(tmp_path, backend="tiled")
