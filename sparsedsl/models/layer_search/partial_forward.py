"""A model in two halves: hidden states, computed from any layer on, and the head that makes logits of them.

A search replaces few layers, and those below them compute what they always do: their outputs are recorded once a text, and a forward then
begins behind them. Logits of a whole text are never there at once: the head is run on some positions at a time. Both work by
calling the model's own forward with some of its modules answering from memory, and are tried on a few tokens before they are trusted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Body", "Head"]

Tensor = torch.Tensor
TRIED = 16  # tokens that shortcuts are tried on


class Body:
    """The model without its head. ``layers``: layer index -> attention module.

    ``stack``: the module whose output holds the last hidden states, the one that owns the blocks. ``resumes``: a forward may begin behind
    the first layers; where layers hand on more than hidden states it may not, and all of them run.
    """

    def __init__(self, model: PreTrainedModel, layers: Mapping[int, Any], ids: Tensor) -> None:
        self.base: Any = model.base_model
        # A model may be its own base; then its head runs too, on as little as possible.
        self._words: dict[str, Any] = {"use_cache": False, **({"logits_to_keep": 1} if self.base is model else {})}
        self.stack, self.blocks, self.places = _blocks(model, layers)
        self.output: Any = None  # what the stack gave last
        self.resumes = bool(self.places)
        self.resumes = self.resumes and self._is_right(ids[:, :TRIED])

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states ``(1, S, d)`` of token ids ``(1, S)``."""
        hook = self.stack.register_forward_hook(lambda module, args, output: setattr(self, "output", output))
        try:
            self.base(input_ids=ids, **self._words)
        finally:
            hook.remove()
        return self.output.last_hidden_state

    def recorded(self, ids: Tensor, layers: Collection[int]) -> tuple[Tensor, dict[int, Any]]:
        """The same, and for each layer what the one before it gave, to be handed to :meth:`hidden_from`."""
        found: dict[int, Any] = {}
        with contextlib.ExitStack() as hooks:
            for layer in layers if self.resumes else ():
                if self.places[layer] > 0:
                    keep = _keeping(found, layer)
                    hooks.callback(self.blocks[self.places[layer] - 1].register_forward_hook(keep).remove)
            return self.hidden(ids), found

    def hidden_from(self, ids: Tensor, layer: int, recorded: Mapping[int, Any]) -> Tensor:
        """Last hidden states of a forward that begins with ``layer``, where its input was recorded, else with the first one."""
        with self.beginning_with(layer, recorded):
            return self.hidden(ids)

    @contextlib.contextmanager
    def beginning_with(self, layer: int, recorded: Mapping[int, Any]) -> Iterator[None]:
        """Within, layers before ``layer`` answer from memory if its input was recorded."""
        skipped = self.blocks[: self.places[layer]] if self.resumes and layer in recorded else ()
        with contextlib.ExitStack() as changes:
            for block in skipped:
                changes.enter_context(_answering(block, recorded[layer]))
            yield

    def _is_right(self, ids: Tensor) -> bool:
        """Whether a forward that begins with any of the layers gives what a whole one gives, to the last bit."""
        with torch.no_grad():
            whole, recorded = self.recorded(ids, list(self.places))
            try:
                return all(torch.equal(self.hidden_from(ids, layer, recorded), whole) for layer in recorded)
            except Exception:  # whatever a model misses of the layers that did not run: then all of them run
                return False


class Head:
    """Logits ``(n, words)`` of hidden states ``(n, d)``, with all that the model does to them: soft caps, scales, biases.

    Raises :class:`~sparsedsl.UnsupportedError` for a model whose forward does not end with a head over last hidden states.
    """

    def __init__(self, model: PreTrainedModel, body: Body, ids: Tensor) -> None:
        self.model: Any = model
        self.stack, few = body.stack, ids[:, :TRIED]
        with torch.no_grad():
            hidden = body.hidden(few)[0]
            self.answer = type(body.output)  # of the model's own kind: its forward may read fields that others have not
            wanted = getattr(self.model(input_ids=few, use_cache=False), "logits", None)
            if self.stack is not model and wanted is not None and wanted.ndim == 3:
                self.words, found = wanted.shape[-1], self(hidden)
                if found.shape == wanted.shape[1:] and torch.allclose(found.float(), wanted[0].float(), rtol=1e-3, atol=1e-3):
                    return
        raise UnsupportedError(
            f"search(): {type(model).__name__} does not give logits of the next token by a head over its last hidden states; give a "
            "model for causal language modelling, such as AutoModelForCausalLM loads"
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of some positions."""
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        with _answering(self.stack, self.answer(last_hidden_state=hidden[None])):
            return self.model(input_ids=ids, use_cache=False).logits[0]


def _blocks(model: Any, layers: Mapping[int, Any]) -> tuple[Any, list[Any], dict[int, int]]:
    """The module that owns the list of blocks, these one after the other, and layer index -> place of the block that its attention is in.

    Where the attention modules do not stand in one list: the model without its head, and no blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    holders, places = set(), {}
    for layer, module in layers.items():
        parts = names[id(module)].split(".")
        for depth in range(len(parts) - 1, 0, -1):
            if isinstance(model.get_submodule(".".join(parts[:depth])), torch.nn.ModuleList):
                holders.add(".".join(parts[:depth]))
                places[layer] = int(parts[depth])
                break
    if len(holders) != 1 or len(set(places.values())) != len(layers):
        return model.base_model, [], {}
    (holder,) = holders
    return model.get_submodule(holder.rpartition(".")[0]), list(model.get_submodule(holder)), places


def _keeping(found: dict[int, Any], layer: int) -> Any:
    def keep(module: Any, args: Any, output: Any) -> None:
        found[layer] = output

    return keep


@contextlib.contextmanager
def _answering(module: Any, answer: Any) -> Iterator[None]:
    """A module gives ``answer`` instead of running. Its hooks are called; another ``forward`` of its own that it may have comes back."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **words: answer
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
