"""Every program of the library that reads no later query, as a layer of a model: cached, batched, in pieces and in beams the same."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import sparsedsl as sd
from sparsedsl.program.graph import as_program
from sparsedsl.program.in_layers import is_for_prefill
from sparsedsl.program.recurrences import Linear
from tests.models.families import left_padded, tokens
from tests.models.hybrid_models import convert, donor

P = sd.patterns
LIBRARY: dict[str, Any] = {
    "based": P.based(),
    "csa": P.csa(block=2, top_k=2, window=3),
    "delta_net": P.delta_net(),
    "differential": P.differential(),
    "dsa": P.dsa(top_k=3),
    "gated_delta": P.gated_delta(),
    "gla": P.gla(),
    "rwkv6": P.rwkv6(),
    "rwkv7": P.rwkv7(),
    "hca": P.hca(block=4, window=3),
    "hils": P.hils(chunk=3, top_k=2, window=3),
    "hisa": P.hisa(block=3, blocks=2, top_k=3),
    "hsa": P.hsa(chunk=3, top_k=2),
    "hsa_ultralong": P.hsa_ultralong(chunk=3, top_k=2, window=3),
    "infllm_v2": P.infllm_v2(length=4, stride=2, select=4, top_k=2, local=1),
    "kda": P.kda(),
    "landmark": P.landmark(block=3, top_k=2),
    "moba": P.moba(chunk=3, top_k=2),
    "nha": P.nha(slots=3, window=4),
    "nsa": P.nsa(block=2, select=4, top_k=2, window=3),
    "nsa_published": P.nsa_published(length=4, stride=2, select=4, top_k=2, window=3),
    "qsa": P.qsa(unit=3),
    "quest": P.quest(page=3, pages=2),
    "ring_linear": P.ring_linear([0.5, 0.7, 0.9, 0.99]),
    "ssd": P.ssd(),
}
# They choose by later tokens, and run on whole prompts alone.
BY_PROMPT = {"flexprefill", "h2o", "minference", "mosa", "pbs", "seer_attention", "snapkv", "token_sparse", "vsa", "xattention"}
ATOL = 1e-10


class Made(sd.models.Layer):
    """Makes whatever a program reads of hidden states, by weights that do not matter."""

    def __init__(self, donor: Any, name: str) -> None:
        super().__init__(donor, LIBRARY[name])
        linear = next(self.program.nodes(Linear), None)
        self.group = 1 if linear is None else donor.heads // donor.kv_heads
        self.sizes = {
            "heads": donor.heads,
            "kv_heads": donor.kv_heads,
            "value_heads": donor.heads,
            "head_dim": donor.head_dim,
            "one": 1,
        }
        self.sizes |= {"index_heads": 3, "index_dim": 4, "retrieval_heads": donor.kv_heads, "retrieval_dim": 4, "width": 2}
        asked = {name: node.axes for name, node in self.program.inputs.items() if node.default is None}
        of_all = {name: asked.pop(name) for name in list(asked) if asked[name][0] != "batch"}  # the same for all tokens
        self.fixed = nn.ParameterDict({name: torch.randn([*map(self.size, axes)]) for name, axes in of_all.items()})
        self.rows = {name: axes for name, axes in asked.items() if axes[2] in ("queries", "keys")}
        self.marks = {name: axes for name, axes in asked.items() if name not in self.rows}
        self.made = nn.ModuleDict({name: nn.Linear(donor.hidden_size, self.width(axes)) for name, axes in asked.items()})

    def width(self, axes: tuple[str, ...]) -> int:
        return self.size(axes[1]) * (self.size(axes[3]) if len(axes) > 3 else 1)

    def size(self, axis: str) -> int:
        return int(axis) if axis.isdecimal() else self.sizes[axis]

    def tensor(self, name: str, axes: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        made = self.heads(self.made[name](x), self.size(axes[1]))
        if name in ("g", "beta"):
            made = torch.nn.functional.logsigmoid(made) if name == "g" else torch.sigmoid(made)
        if name == "blocks":
            return torch.stack([made[..., 0] > 0, torch.where(made[..., 1] > 0, 2, -1)], -1).long()
        return made if len(axes) > 3 else made[..., 0]

    def inputs(self, x: torch.Tensor, raw: Any, rope: Any) -> dict[str, torch.Tensor]:
        made = {name: self.tensor(name, axes, x) for name, axes in self.rows.items()} | dict(self.fixed.items())
        return made | {"k": rope.k.repeat_interleave(self.group, 1), "v": rope.v.repeat_interleave(self.group, 1)}

    def landmarks(self, chunks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: self.tensor(name, axes, chunks.mean(2)) for name, axes in self.marks.items()}


def logits(model: Any, ids: torch.Tensor, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, **words).logits
    return found


def test_no_program_of_the_library_is_left_out() -> None:
    programs = set()
    for name in P.__all__:
        try:
            program = as_program(getattr(P, name)())
        except sd.SparseDSLError:  # wants numbers: a mask or a score, or one that is named above
            continue
        if program is not None and program.static is None:
            programs.add(name)
            assert is_for_prefill(program) == (name in BY_PROMPT)
    assert programs | {"ring_linear"} == set(LIBRARY) | BY_PROMPT


@pytest.mark.parametrize("name", LIBRARY)
def test_cached_batched_in_pieces_and_in_beams_are_one(name: str) -> None:
    torch.manual_seed(1)
    model = donor("llama")
    handle = convert(model, {1: functools.partial(Made, name=name)})
    ids = tokens(1, 17)
    whole = logits(model, ids, use_cache=False)
    cache, parts = handle.cache(), []
    for part in ids.split((7, 1, 5, 1, 3), dim=1):
        parts.append(logits(model, part, past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=ATOL, rtol=0)

    padded, words = left_padded(2, 11, 4), {"max_new_tokens": 4, "do_sample": False}
    own = padded["input_ids"][:1, 4:]
    alone = model.generate(own, **words, use_cache=False)
    assert torch.equal(model.generate(**padded, **words)[0, 4:], alone[0])
    beams = model.generate(own, **words, num_beams=2, use_cache=False)
    assert torch.equal(model.generate(**padded, **words, num_beams=2)[0, 4:], beams[0])
    try:
        looked_up = model.generate(own, **words, prompt_lookup_num_tokens=2)
    except sd.UnsupportedError as error:
        assert "generate() without" in str(error)
    else:
        assert torch.equal(looked_up, alone)
