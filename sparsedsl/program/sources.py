"""Nodes that an attention looks into beside plain keys: slots that remember the past; and how picked chunks are weighted."""

from __future__ import annotations

import functools
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word
from sparsedsl.program.axes import base_of, block_of
from sparsedsl.program.node import Node, one_of
from sparsedsl.program.scores import Scores, check_scores
from sparsedsl.program.select import Choice, Select
from sparsedsl.program.tensors import check_block, check_tensor, k, v

__all__ = ["PerChunk", "Slots", "check_documents", "per_chunk", "slots"]

RULES = ("softmax", "softmax1", "stick_breaking", "sigmoid")


@dataclass(frozen=True, eq=False, repr=False)
class PerChunk:
    """A softmax of its own in every picked chunk, and weights for the chunks."""

    selected: Choice
    weights: str
    scores: Scores
    inner: str
    function: ClassVar[str] = "per_chunk"


def per_chunk(selected: Choice, weights: str = "softmax", *, scores: Scores | None = None, inner: str = "softmax") -> PerChunk:
    """The normaliser of hierarchical attention: ``out = sum_c w_c softmax_c(logits) V``, softmax and sum over one picked chunk each.

    Gradients reach the scores through the weights; chunks that were not picked get exactly none.

    Args:
        selected: the choice that stands in the mask.
        weights: of the picked chunks, from their scores ``s``: ``"softmax"``; ``"softmax1"``, with one more logit of 0;
            ``"stick_breaking"``, ``sigmoid(s_c)`` of what more recent chunks left; ``"sigmoid"``.
        scores: default those the choice was made by; others of the same blocks, to choose by one and weigh by another.
        inner: softmax within a chunk: ``"softmax"`` or ``"softmax1"``, with one more logit of 0 and value 0.

    The LSE of such an attention is that of its weights: :func:`joint` then weighs it against other branches.

    Source: HSA-UltraLong (arXiv 2511.23319), RAMba (arXiv 2504.16795).

    >>> import sparsedsl as sd
    >>> selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 16)
    >>> sd.per_chunk(selected, "stick_breaking").weights
    'stick_breaking'
    """
    if not isinstance(selected, Choice):
        raise PatternError(f"per_chunk(): selected must come from top_k(), top_p(), threshold() or given(); got {selected!r}")
    if selected.blocks[0] != 1:
        raise PatternError(f"per_chunk(): selected must be made for single queries; these are for {selected.blocks[0]} at a time")
    check_word("per_chunk(): weights", weights, RULES)
    check_word("per_chunk(): inner", inner, ("softmax", "softmax1"))
    if scores is None and not isinstance(selected, Select):
        raise PatternError(f"per_chunk(): {selected!r} was chosen by nothing that is known here; say what weighs it, scores=")
    scores = selected.scores if scores is None else check_scores("per_chunk", scores)  # type: ignore[attr-defined]
    if scores.axes[2:] != selected.axes[2:]:
        raise PatternError(f"per_chunk(): scores must be of the blocks selected, {' '.join(selected.axes[2:])!r}; got {scores!r}")
    return PerChunk(selected, weights, scores, inner)


@dataclass(frozen=True, eq=False, repr=False)
class Slots(Node):
    """M rows of keys and values for every position, written and faded by gates."""

    y: Node
    z: Node
    gate: Node
    delay: int = 0
    temperature: float = 1.0
    empty: str = "zero_sink"
    documents: Node | None = None
    first: int = 0
    function: ClassVar[str] = "slots"
    gives: ClassVar[str] = "memory"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Slots of every position."""
        return "batch", self.gate.axes[1], "keys", self.gate.axes[3]


def slots(
    gate: Node,
    *,
    y: Node = k,
    z: Node = v,
    delay: int = 0,
    temperature: float = 1.0,
    empty: str = "zero_sink",
    documents: Node | None = None,
    first: int = 0,
) -> Slots:
    """A memory of M slots a key/value head: token ``e`` fades slot ``m`` by ``a = sigmoid(gate_em) ** (1 / temperature)`` and writes
    ``1 - a`` of its key and value into it. A query at ``t`` sees what tokens up to ``t - delay`` have written.

    Args:
        gate: ``(batch, kv_heads, keys, M)``: logits.
        y: keys, default k.
        z: values, default v.
        delay: tokens between a token and its first reader; 0: a token reads what it wrote itself.
        temperature: above 0; higher fades more slowly.
        empty: slots that nothing was written to: ``"zero_sink"``: they have logit 0 and value 0 and take part in the softmax;
            ``"masked"``: they take no part.
        documents: an input of document ids, ``(batch, keys)``, non-decreasing: a document starts with empty slots.
        first: so many tokens at the beginning are never written and fade nothing: attend to them beside the slots. Not with ``documents``
            or masked empty slots.

    Source: gated slot attention (arXiv 2409.07146); native hybrid attention (arXiv 2510.07019) with ``delay=window, temperature=8``.

    >>> import sparsedsl as sd
    >>> sd.slots(sd.input("gate", "batch kv_heads keys 64"), delay=32, temperature=8).axes
    ('batch', 'kv_heads', 'keys', '64')
    """
    gate, y, z = (check_tensor("slots", word, x, "keys") for word, x in (("gate", gate), ("y", y), ("z", z)))
    for word, x in (("gate", gate), ("y", y), ("z", z)):
        if block_of(x.axes[2]) != 1 or x.axes[1] != y.axes[1]:
            raise PatternError(
                f"slots(): {word} must have one row a key, and the heads of the keys; its axes are {' '.join(x.axes)!r}"
            )
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real) or not 0 < temperature < float("inf"):
        raise PatternError(f"slots(): temperature must be a positive number; got {temperature!r}")
    check_word("slots(): empty", empty, ("zero_sink", "masked"))
    documents, first = check_documents("slots", documents), check_block("slots", "first", first, 0)
    if first and (documents is not None or empty == "masked"):
        raise PatternError(
            f"slots(): first={first} leaves out tokens at the beginning of the call, and knows neither documents nor empty='masked'; "
            "call it document by document, with empty='zero_sink'"
        )
    return one_of(Slots(y, z, gate, check_block("slots", "delay", delay, 0), float(temperature), empty, documents, first))


def check_documents(function: str, documents: Any) -> Node | None:
    """None, or a node with one id a token."""
    if documents is None:
        return None
    if not isinstance(documents, Node) or documents.gives != "tensor" or tuple(map(base_of, documents.axes)) != ("batch", "keys"):
        raise PatternError(f"{function}(): documents must be an input with the axes 'batch keys'; got {documents!r}")
    return documents
