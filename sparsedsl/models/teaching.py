"""What the donor's layers make of an input, for converted layers to learn from: inputs and outputs of attention modules.

A lesson's inputs do not depend on any student: they are made once, and then only attention layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError
from sparsedsl.models.carried import request_of
from sparsedsl.models.converted import CONVERTED, LAYER
from sparsedsl.models.index_learning import index_loss

if TYPE_CHECKING:
    from sparsedsl.models.mask_arguments import MaskRequest

__all__ = ["Lesson", "Teacher", "lessons"]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One forward of one attention module of the donor. ``inputs``: hidden states ``(B, T, hidden_size)`` that it got; ``output``: what it
    gave, of the same shape; both without gradients. ``real``: ``(B, T)``, which of these are tokens, or None: all.

    >>> import torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> handle = sd.models.convert(LlamaForCausalLM(LlamaConfig(**tiny)), {0: sd.models.NHA, 1: sd.models.NHA})
    >>> for layer, lesson in handle.lessons(torch.arange(8)[None]).items():
    ...     print(layer, lesson.student().shape == lesson.output.shape)
    0 True
    1 True
    """

    inputs: torch.Tensor
    output: torch.Tensor
    real: torch.Tensor | None
    _module: Any
    _words: Mapping[str, Any]
    _request: MaskRequest | None

    def student(self) -> torch.Tensor:
        """What the module gives now for the same inputs, with gradients to its parameters."""
        converted = getattr(self._module, CONVERTED)
        converted.request = self._request
        try:
            found: torch.Tensor = self._module(self.inputs, **self._words)[0]
        finally:
            converted.request = None
        return found

    def loss(self, *, chosen: bool = False) -> torch.Tensor:
        """``|student - output|^2 / |output|^2`` over real tokens; of a layer with an index (``DSA``), how far its scores are from what the
        donor pays to each key. ``chosen``: of such a layer, over the keys that each token picks.

        Raises:
            PatternError: ``chosen`` of a layer that has no index.
        """
        layer = getattr(self._module, LAYER)
        if layer.has_index:
            return index_loss(self._module, self.inputs, self._words["position_embeddings"], self._request, chosen)
        if chosen:
            raise PatternError(
                f"loss(chosen=True) is of layers with an index, such as sd.models.DSA; this is {type(layer).__name__}"
            )
        wrong, size = self.student() - self.output, self.output
        if self.real is not None:
            wrong, size = wrong[self.real], size[self.real]
        return wrong.float().square().sum() / size.float().square().sum()


@dataclass(frozen=True, eq=False)
class Teacher:
    """One layer of a donor: called with what the model is called with, it gives a :class:`Lesson`. ``run``: gives those of all layers."""

    run: Callable[..., dict[int, Lesson]]
    layer: int

    def __call__(self, *inputs: Any, **more: Any) -> Lesson:
        """Run the donor on inputs of the model."""
        return self.run(*inputs, **more)[self.layer]


def lessons(model: Any, modules: Mapping[int, Any], *inputs: Any, **more: Any) -> dict[int, Lesson]:
    """Layer index -> lesson, by one run of a model whose converted modules are switched to the donor's forward."""
    found: dict[int, Lesson] = {}
    hooks = [
        module.register_forward_hook(
            lambda m, args, words, out, i=index: found.update({i: _lesson(m, args, words, out)}), with_kwargs=True
        )
        for index, module in modules.items()
    ]
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs, **{**more, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in training.items():
            part.training = mode
    return found


def _lesson(module: Any, args: tuple[Any, ...], words: dict[str, Any], out: Any) -> Lesson:
    words = dict(words)
    x = args[0] if args else words.pop("hidden_states")
    words |= dict(zip(("position_embeddings", "attention_mask", "past_key_values"), args[1:], strict=False))
    mask, stack = words.get("attention_mask"), getattr(module, CONVERTED).stack
    request = request_of(mask)
    if request is None and mask is None:
        omitted = (r for r in reversed(stack.omitted.values()) if r.q_offset == 0 and r.q_length == x.shape[1])
        request = next(omitted, None)
    padding = None if request is None else request.padding
    real = None if padding is None else padding[:, : x.shape[1]].expand(x.shape[0], -1)
    return Lesson(x.detach(), out[0].detach(), real, module, words, request)
