"""Linear attention: a state that decays, is written by every token, and is read without a softmax."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.wrapped import Expression
from sparsedsl.program.axes import GATED_HEADS, base_of, block_of
from sparsedsl.program.branches import Branch, check_scale
from sparsedsl.program.node import Node, one_of
from sparsedsl.program.sources import check_documents
from sparsedsl.program.tensors import check_tensor, k, q, v

__all__ = ["FEATURES", "Linear", "linear"]

FEATURES = ("l2", "elu1", "relu", "taylor", "exp")
NORMALISED = ("sum", "max1")


@dataclass(frozen=True, eq=False, repr=False)
class Linear(Branch):
    """Decayed linear attention: a sum without a softmax.

    ``decay``: logarithms, one for all heads, one a head, or a node with one a key; or ``factor``, a node with the decays themselves.
    """

    decay: float | tuple[float, ...] | Node | None = None
    factor: Node | None = None
    beta: Node | None = None
    features: str | None = None
    normalised: str | None = None
    eps: float = 1e-6
    reads: str = "after"
    bonus: Node | None = None
    write: Node | None = None
    x: Node = q
    y: Node = k
    z: Node = v
    scale: float | None = None
    documents: Node | None = None
    delay: int = 0
    first: int = 0
    erase: Node | None = None
    along: Node | None = None
    function: ClassVar[str] = "linear"
    words: ClassVar[Mapping[str, str]] = {"decay": "log_decay", "factor": "decay", "x": "q", "y": "k", "z": "v"}

    @property
    def has_lse(self) -> bool:
        """Whether the sum that it divides by is one of positive weights, whose logarithm another softmax could weigh it by."""
        return self.normalised == "sum" and self.features in ("elu1", "taylor", "exp")

    @property
    def gate(self) -> Node | None:
        """The node that gives the decays of keys; None where they are constants."""
        return self.decay if isinstance(self.decay, Node) else self.factor

    @property
    def log_decays(self) -> tuple[float, ...]:
        """Of constant decays the logarithms: one for all heads or one a head; empty where a node gives them."""
        if isinstance(self.decay, tuple):
            return self.decay
        return () if self.decay is None or isinstance(self.decay, Node) else (self.decay,)

    @property
    def vector(self) -> bool:
        """Whether every channel of a key has a decay of its own."""
        return self.gate is not None and len(self.gate.axes) == 4

    @property
    def form(self) -> str:
        """What backends are asked for, in words: ``""`` is a constant decay a head and a plain sum."""
        rule = "delta" if self.beta is not None or self.erase is not None else ""
        return f"{'vector' if self.vector else 'scalar'} {rule}".strip() if rule or self.gate is not None else ""

    @functools.cached_property
    def warnings(self) -> tuple[str, ...]:
        """What is legal and probably not meant."""
        if self.beta is None or self.features == "l2":
            return ()
        return (
            "the delta rule multiplies the state along a key by decay * (1 - beta * |k| ** 2): with longer keys than sqrt(2 / beta) it "
            "grows from token to token; features='l2' makes them of length 1",
        )


def linear(
    decay: float | Sequence[float] | Node | None = None,
    *,
    log_decay: float | Sequence[float] | Node | None = None,
    beta: Node | None = None,
    features: str | None = None,
    normalised: str | None = None,
    eps: float = 1e-6,
    reads: str = "after",
    bonus: Node | None = None,
    write: Node | None = None,
    q: Node = q,
    k: Node = k,
    v: Node = v,
    scale: float | None = None,
    documents: Node | None = None,
    delay: int = 0,
    first: int = 0,
    erase: Node | None = None,
    along: Node | None = None,
) -> Linear:
    """``out_t = scale q_t S_t``, ``S_t = decay_t S_(t-1) + k_t^T u_t``: causal, state in float32. ``u_t = v_t``; with ``beta`` the delta
    rule, ``u_t = beta_t (v_t - k_t decay_t S_(t-1))``: the error of what the state, decayed already, gives for the key. With ``erase`` a
    rule of two keys, ``S_t = Sd - along_t^T (erase_t Sd) + k_t^T v_t``, ``Sd = decay_t S_(t-1)``.

    Args:
        decay: factors in (0, 1]: a number for all heads, one for every output head, or a node with the axes ``batch H keys`` (one a key)
            or ``batch H keys head_dim`` (one a channel of a key), in [0, 1]. ``H`` is one of ``one, kv_heads, heads, value_heads``.
        log_decay: their logarithms, in place of ``decay``; a table of :func:`sparsedsl.decay_table` brings its own. At most 0; -inf
            forgets all that was before. Gates are best made in float32 and given so: they are not rounded to the type of q.
        beta: the delta rule: how much of the error a key writes, a node ``batch H keys``; in [0, 1], or to 2 for negative eigenvalues.
        features: what becomes of q and k: ``"l2"`` (``x / sqrt(sum x^2 + 1e-6)``), ``"elu1"`` (``elu(x) + 1``), ``"relu"``,
            ``"exp"``, or ``"taylor"`` (1, x, and the products of two: a weight is ``1 + s + s^2 / 2`` of ``s = scale q k``).
        normalised: ``"sum"``: out is divided by the sum of the weights plus ``eps`` (0 where the sum is 0 and eps too); ``"max1"``: by
            its absolute value, or by 1 where that is less. Not with ``beta``.
        eps: at least 0.
        reads: ``"after"`` the token has written, or ``"before"``: ``out_t = scale q_t (S_(t-1) + bonus k_t^T v_t)``.
        bonus: with ``reads="before"``, a node ``H head_dim``: a factor a channel for the token's own key.
        write: with ``normalised="max1"``, a node ``batch H keys``: the logarithm of the strength that a key is written with.
        q, k, v: nodes in place of the call's own. Values may have more heads than keys (then ``value_heads``): k and q are repeated.
        scale: default ``head_dim ** -0.5``.
        documents: an input of document ids, ``(batch, keys)``, non-decreasing: a document starts with an empty state.
        delay: a query reads keys that are at least so many tokens back, as those that a window of so many leaves out; with ``decay=1.0``.
        first: so many tokens at the beginning are never written; with ``decay=1.0``.
        erase: in place of ``beta``, a node ``batch H keys head_dim``: the key by which a token reads the decayed state for what it takes
            off. The state does not grow by it where ``erase . along`` lies in [0, 2].
        along: with ``erase``, a node of the same axes: the key that what was read is taken off along; default k. It makes two rows a token
            of a scan, and so takes twice the time. RWKV-7, with ``n`` its removal key of length 1 and ``a`` its rate:
            ``erase = n e^-log_decay``, as it reads what has not decayed yet, and ``along = n a``.

    The state has as many heads as the most of k, v and the gates have, and query heads above that share it; with constant decays it has
    one for every output head. Gradients reach q, k, v, gates, ``bonus``, ``erase``, ``along`` and the state a call begins with.

    Raises:
        PatternError: none or both of ``decay`` and ``log_decay``, nodes of other axes, and what does not go together.

    Source: Ring-linear (arXiv 2510.19338), Lightning Attention (2405.17381), GLA (2312.06635), Mamba-2 (2405.21060), DeltaNet
    (2406.06484), Gated DeltaNet (2412.06464), KDA (2510.26692), RWKV-6 (2404.05892), RWKV-7 (2503.14456), BASED (2402.18668), xLSTM
    (2405.04517).

    >>> import sparsedsl as sd
    >>> sd.linear([0.5, 0.9]).decay
    (-0.6931471805599453, -0.10536051565782628)
    >>> g, beta = (sd.input(name, "batch value_heads keys") for name in ("g", "beta"))
    >>> print(sd.Program(sd.linear(log_decay=g, beta=beta, features="l2")).text.splitlines()[-1])
    linear = linear(log_decay=g, beta=beta, features='l2')
    """
    if (decay is None) == (log_decay is None):
        raise PatternError(
            f"linear(): give one of decay and log_decay; got {'neither' if decay is None else 'both'}. A state that fades not at all has "
            "decay=1.0"
        )
    queries, k, v = _rows("q", q, "queries"), _rows("k", k, "keys"), _rows("v", v, "keys")
    if queries.axes[3] != k.axes[3]:
        raise PatternError(f"linear(): q and k must have the same last axis; got {queries.axes[3]!r} and {k.axes[3]!r}")
    logs, factor = _decays(decay, log_decay, k)
    made = Linear(
        logs, factor, None if beta is None else _gate("beta", beta), _word("features", features, FEATURES),
        _word("normalised", normalised, NORMALISED), _eps(eps), check_word("linear(): reads", reads, ("after", "before")),
        None if bonus is None else _bonus(bonus, k), None if write is None else _gate("write", write), queries, k, v,
        check_scale("linear", scale), check_documents("linear", documents), _tokens("delay", delay), _tokens("first", first),
        None if erase is None else _key("erase", erase, k), None if along is None else _key("along", along, k),
    )  # fmt: skip
    _check_together(made)
    return one_of(made)


def _tokens(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PatternError(f"linear(): {name} must be a whole number of tokens, at least 0; got {shown(value)}")
    return value


def _word(name: str, value: Any, known: tuple[str, ...]) -> str | None:
    return None if value is None else check_word(f"linear(): {name}", value, known)


def _eps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise PatternError(f"linear(): eps must be a number of at least 0; got {shown(value)}")
    return float(value)


def _rows(name: str, value: Any, rows: str) -> Node:
    node = check_tensor("linear", name, value, rows)
    if node.axes[1] not in GATED_HEADS or block_of(node.axes[2]) != 1:
        raise PatternError(
            f"linear(): {name} must have one row for each of the {rows}, in {', '.join(GATED_HEADS)}; got {' '.join(node.axes)!r}"
        )
    return node


def _decays(decay: Any, log_decay: Any, k: Node) -> tuple[Any, Node | None]:
    """What a :class:`Linear` holds of its decays: logarithms, or a node; and a node of factors."""
    given, name = (decay, "decay") if log_decay is None else (log_decay, "log_decay")
    if isinstance(given, (Expression, Pattern)) or (isinstance(given, Node) and given.gives not in ("tensor",)):
        raise PatternError(
            f"linear(): {name} must be numbers or an input; got {shown(given)}. A linear attention runs along all earlier keys: a mask has "
            "no place in it. Attend to a window beside it: sd.mix(window, sd.linear(...), weights=...)"
        )
    if isinstance(given, Node):
        gate = _gate(name, given, k)
        return (gate, None) if name == "log_decay" else (None, gate)
    logs = getattr(decay, "log_decay", log_decay)
    if logs is not None:
        values = _numbers("log_decay", logs)
        if not all(x <= 0 for x in values):
            raise PatternError(f"linear(): log_decay must be at most 0 for each query head; got {logs!r}")
        return (values[0] if isinstance(logs, numbers.Real) else values), None
    values = _numbers("decay", decay)
    if not all(0 < x <= 1 for x in values):
        raise PatternError(f"linear(): decay must be one factor in (0, 1] for each query head; got {decay!r}")
    values = tuple(map(math.log, values))
    return (values[0] if isinstance(decay, numbers.Real) else values), None


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    several = (values,) if isinstance(values, numbers.Real) else values
    found = tuple(several) if isinstance(several, Sequence) and not isinstance(several, str) else ()
    if not found or not all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in found):
        raise PatternError(
            f"linear(): {name} must be a number, one number for each query head, or an input with the axes 'batch heads keys'; got "
            f"{shown(values)}"
        )
    return tuple(map(float, found))


def _gate(name: str, value: Any, k: Node | None = None) -> Node:
    """A node with a number a key of every head; with ``k`` also one with a number a channel of that."""
    wanted = "'batch H keys'" if k is None else f"'batch H keys' or 'batch H keys {k.axes[3]}'"
    wanted = f"linear(): {name} must be an input with the axes {wanted}, H one of {', '.join(GATED_HEADS)}"
    if not isinstance(value, Node) or value.gives != "tensor":
        raise PatternError(f"{wanted}; got {shown(value)}")
    axes = value.axes
    more = "" if len(axes) < 3 or base_of(axes[2]) != "queries" else ". Gates are counted by keys, which a call may have more of"
    if len(axes) > 2 and block_of(axes[2]) > 1:
        more = ". Blocks of keys have no gates of their own: repeat them for the keys of a block"
    if k is not None and len(axes) == 4 and axes[3] != k.axes[3]:
        more = f". A decay for every channel has the last axis of the keys, {k.axes[3]!r}"
    fits = len(axes) == 3 or (k is not None and len(axes) == 4 and axes[3] == k.axes[3])
    if not fits or axes[0] != "batch" or axes[1] not in GATED_HEADS or axes[2] != "keys":
        raise PatternError(f"{wanted}; got {' '.join(axes)!r}{more}")
    return value


def _key(name: str, value: Any, k: Node) -> Node:
    axes = value.axes if isinstance(value, Node) and value.gives == "tensor" else ()
    if len(axes) != 4 or axes[0] != "batch" or axes[1] not in GATED_HEADS or axes[2:] != ("keys", k.axes[3]):
        raise PatternError(
            f"linear(): {name} must be an input with the axes 'batch H keys {k.axes[3]}', H one of {', '.join(GATED_HEADS)}; got "
            f"{' '.join(axes) or shown(value)!r}"
        )
    return value


def _bonus(value: Any, k: Node) -> Node:
    fits = isinstance(value, Node) and value.gives == "tensor" and len(value.axes) == 2
    if not fits or value.axes[0] not in GATED_HEADS or value.axes[1] != k.axes[3]:
        got = " ".join(value.axes) if isinstance(value, Node) and value.gives == "tensor" else shown(value)
        raise PatternError(f"linear(): bonus must be an input with the axes 'heads {k.axes[3]}'; got {got!r}")
    return value


def _check_together(node: Linear) -> None:
    """Refuse what has no meaning together."""
    if (node.delay or node.first) and (
        node.form or node.reads == "before" or node.log_decays != (0.0,) or node.documents is not None
    ):
        word = "delay" if node.delay else "first"
        raise PatternError(
            f"linear(): {word} is of states in which nothing fades and nothing is corrected, of one sequence: give decay=1.0, and no beta, "
            "reads and documents"
        )
    if node.beta is not None and node.normalised is not None:
        raise PatternError(
            "linear(): the delta rule has no weights to sum up: leave out normalised, and normalise the output by itself (RMSNorm), or "
            "leave out beta"
        )
    if node.beta is not None and node.features == "taylor":
        raise PatternError(
            "linear(): features='taylor' has keys that grow, and the delta rule with them; use features='l2' with beta"
        )
    _check_erasing(node)
    if node.vector and node.features == "taylor":
        raise PatternError(
            f"linear(): features='taylor' makes keys wider than {node.y.axes[3]}, so that channels have no decay; use one with the axes "
            "'batch heads keys', or a constant"
        )
    if node.reads == "before" and node.beta is not None:
        raise PatternError("linear(): reads='before' and beta are of different rules; leave one of them out")
    if node.bonus is not None and node.reads != "before":
        raise PatternError("linear(): bonus weighs the token's own key where it is read before it is written: add reads='before'")
    if node.bonus is not None and node.features == "taylor":
        raise PatternError("linear(): features='taylor' makes keys wider than bonus; leave bonus out")
    if node.write is not None and node.normalised != "max1":
        raise PatternError(
            "linear(): write= strengthens keys and the sum they are divided by: add normalised='max1'; else multiply v by the strength"
        )


def _check_erasing(node: Linear) -> None:
    """Refuse what has no meaning together with a rule of two keys."""
    if node.erase is None:
        if node.along is not None:
            raise PatternError("linear(): along says where what erase= reads is taken off: give erase too")
        return
    if node.beta is not None:
        raise PatternError("linear(): erase and beta both say what a token takes off: leave beta out, and multiply erase by it")
    if node.normalised is not None:
        raise PatternError("linear(): what is erased leaves no weights to sum up: leave out normalised, or erase")
    if node.features == "taylor":
        raise PatternError("linear(): features='taylor' makes keys wider than erase; leave one of them out")
    if node.reads == "before":
        raise PatternError("linear(): reads='before' and erase are of different rules; leave one of them out")
