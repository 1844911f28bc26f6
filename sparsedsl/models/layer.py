"""Hybrid layers: what stands in an attention module's place, with parameters of its own and a program over the module's heads."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.program.axes import base_of, block_of, windows_of
from sparsedsl.program.branches import as_branch
from sparsedsl.program.graph import Program, as_program

__all__ = ["Layer", "by_tokens", "chunk_inputs", "chunk_of"]


class Layer(nn.Module):
    """What an attention module of a pretrained model becomes: a program over its heads, and whatever new parameters it reads.

    The projections, norms and rotation of the module stay where they are, and their names; the layer lies beside them as ``sd_layer``. A
    subclass says how the inputs of its program are made, in its constructor, :meth:`inputs` and :meth:`init`:

    >>> import torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> class Fading(sd.models.Layer):  # gated slot attention: no window, no positions
    ...     def __init__(self, donor, slots=4):
    ...         super().__init__(donor, sd.patterns.nha(slots, window=0))
    ...         self.gate = torch.nn.Linear(donor.hidden_size, donor.kv_heads * slots)
    ...     def inputs(self, x, raw, rope):
    ...         return {"q": raw.q, "k": raw.k, "gate": self.heads(self.gate(x))}
    ...     def init(self, donor, how):
    ...         torch.nn.init.zeros_(self.gate.weight)
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> handle = sd.models.convert(model, {1: Fading})
    >>> handle
    <Conversion of LlamaForCausalLM: layer 1 Fading(slots=4); native: layer 0>
    >>> model(torch.arange(6)[None]).logits.shape
    torch.Size([1, 6, 8])

    Args:
        donor: facts of the module, see :class:`~sparsedsl.models.Donor`.
        program: a pattern, a program, or what they are made of. Dot products of the layer's queries get the donor's scale where it says
            none, attention its soft cap and its sink logits.

    Attributes:
        drops: what of the donor the layer goes without: ``"sinks"``, ``"softcap"``. A program that has no place for one is refused else.
        undecayed: parameters, by the beginning of their names, that weight decay would spoil, beside all that have one dimension or none.
    """

    drops: ClassVar[frozenset[str]] = frozenset()
    undecayed: ClassVar[tuple[str, ...]] = ()
    # Whether it chooses by an index, which learns from what the donor's attention pays (``index_learning``).
    has_index: ClassVar[bool] = False
    # Argument name -> value that the constructor was called with, without the donor: what is saved.
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Note what the constructor is called with, so that subclasses need not."""
        layer = super().__new__(cls)
        if args or kwargs:  # (a copy or a pickle brings its own)
            try:
                bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments
            except TypeError as error:
                takes = ", ".join(
                    str(p.replace(annotation=p.empty)) for p in [*inspect.signature(cls.__init__).parameters.values()][1:]
                )
                # People make a layer, where convert() wants what makes one.
                maker = f"the class {cls.__name__}, or functools.partial({cls.__name__}, ...)"
                way = f". sd.models.convert makes the layers: give it {maker}" if "'donor'" in str(error) else ""
                raise PatternError(f"{cls.__name__}({takes}): {error}{way}") from None
            donor = [*bound.values()][1] if len(bound) > 1 else None
            if not isinstance(donor, Donor):
                raise PatternError(
                    f"{cls.__name__}: the first argument is the donor that sd.models.convert gives; got {shown(donor)}"
                )
            words = list(bound)[2:]  # after self and the donor
            object.__setattr__(layer, "arguments", {word: bound[word] for word in words})
        return layer

    def __init__(self, donor: Donor, program: Any) -> None:
        super().__init__()
        self.layer_idx, self.hidden_size = donor.layer_idx, donor.hidden_size
        self.query_heads, self.kv_heads, self.head_dim = donor.heads, donor.kv_heads, donor.head_dim
        self.program = as_program(program) or Program(as_branch(type(self).__name__, program))
        chunk_of(self.program)

    # ---- what a subclass says ------------------------------------------------------------------------------------------------------

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """The inputs and tables of the program, by name; ``q``, ``k`` and ``v`` among them where they are not those of ``rope``.

        Args:
            x: hidden states ``(B, T, hidden_size)`` as the module gets them.
            raw, rope: queries, keys and values before and after rotation; ``rope.rotate(rows)`` turns other rows of these tokens, ``(B,
                heads, T, head_dim)``, as the module turns its keys.

        An input with an axis ``keys`` is kept with the keys when the model generates; one with ``queries`` is not. Rows of padding are
        given too, and dropped. What has an axis ``keys/64`` comes from :meth:`landmarks`.
        """
        return {}

    def landmarks(self, chunks: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs with a row for so many keys: of the hidden states ``(B, chunks, chunk, hidden_size)`` of chunks that are over."""
        return {}

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What ``o_proj`` gets, of the program's output ``(B, T, heads * value_dim)``."""
        return o

    def init(self, donor: Donor, how: str) -> None:
        """Set new parameters after the donor's weights were loaded: as published, or so that little changes (``"calibrated"``)."""
        check_word(f"{type(self).__name__}: init", how, ("published", "calibrated"))

    # ---- for subclasses ------------------------------------------------------------------------------------------------------------

    def heads(self, rows: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """``(B, T, heads * D)`` -> ``(B, heads, T, D)``; by default the key/value heads."""
        return rows.unflatten(-1, (self.kv_heads if heads is None else heads, -1)).transpose(1, 2)

    # ---- for everyone --------------------------------------------------------------------------------------------------------------

    def decays(self, name: str) -> bool:
        """Whether weight decay does a parameter no harm."""
        return self.get_parameter(name).ndim > 1 and not name.startswith(self.undecayed)

    def extra_repr(self) -> str:
        """The arguments it was made with."""
        return ", ".join(f"{word}={value!r}" for word, value in self.arguments.items())

    @property
    def words(self) -> str:
        """Class and all arguments, defaults included."""
        known = inspect.signature(type(self).__init__).parameters
        values = {name: known[name].default for name in list(known)[2:] if known[name].kind not in (2, 4)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in (values | self.arguments).items())})"


def by_tokens(program: Program) -> dict[str, int]:
    """Input name -> its axis of queries or keys, for those with a row for each."""
    rows = {name: [i for i, axis in enumerate(node.axes) if axis in ("queries", "keys")] for name, node in program.inputs.items()}
    return {"q": 2, "k": 2, "v": 2} | {name: axes[0] for name, axes in rows.items() if axes}


def chunk_inputs(program: Program) -> tuple[str, ...]:
    """The inputs that a layer must give a row for so many keys; those with a default are made of other inputs.

    Raises:
        PatternError: the rows are of windows, which overlap.
    """
    asked = {name: node for name, node in program.inputs.items() if node.default is None}
    for name, node in asked.items():
        if any(map(windows_of, node.axes)):
            raise PatternError(
                f"the input {name!r} ({', '.join(node.axes)}) has rows for windows that overlap, and landmarks() of a layer are made chunk "
                "by chunk. Declare it with default=, so that it is made of the keys: sd.input(..., default=sd.summary(sd.k, ...))"
            )
    return tuple(name for name, node in asked.items() if any(map(_is_chunked, node.axes)))


def chunk_of(program: Program) -> int | None:
    """How many keys those have a row for; None where there are none."""
    sizes = {block_of(axis) for name in chunk_inputs(program) for axis in program.inputs[name].axes if _is_chunked(axis)}
    if len(sizes) > 1:
        raise PatternError(
            f"the inputs of a layer's program have rows for chunks of {sorted(sizes)} keys; give all of them one size"
        )
    return next(iter(sizes), None)


def _is_chunked(axis: str) -> bool:
    return base_of(axis) == "keys" and windows_of(axis) is None and block_of(axis) > 1
