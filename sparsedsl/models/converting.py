"""Turning layers of a pretrained model into hybrid layers, and back: :func:`convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.lang.advice import check_word
from sparsedsl.models.applying import AppliedPatterns, apply
from sparsedsl.models.binding import BINDING
from sparsedsl.models.caches import empty_cache
from sparsedsl.models.carried import Stack, put_stacks, stacks_of, take_stack
from sparsedsl.models.chosen_layers import choose_layers, is_pattern, layer_for
from sparsedsl.models.converted import CONVERTED, LAYER, Converted, converted_class, program_cache
from sparsedsl.models.donor import Donor, donor_of
from sparsedsl.models.layer import Layer
from sparsedsl.models.layers import (
    attention_layers,
    check_module,
    is_told_causal,
    key_owners,
    layer_words,
    native_implementation,
    text_config,
)
from sparsedsl.models.mask_arguments import register_masks
from sparsedsl.models.native import masks_of, native_pattern
from sparsedsl.models.registry import NOTE, VERSION, entry_of
from sparsedsl.models.teaching import Lesson, Teacher, lessons

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Conversion", "conversion", "convert"]

_HANDLE = "_sparsedsl_conversion"  # (so that a copy of a model has a handle of its own)


def convert(
    model: PreTrainedModel,
    layers: Any,
    *,
    init: str | None = "calibrated",
    backend: str = "auto",
    allow: Sequence[str] = (),
) -> Conversion:
    """Turn attention layers of a transformers model into hybrid layers, in place: parameters are added, none is copied or renamed.

    - A *layer* (:class:`Layer`, such as ``sd.models.NHA``): the class, or a function from the donor's facts to one:
      ``functools.partial(sd.models.NHA, slots=16)``.
    - A *program* over q, k and v becomes a layer without parameters, whose cache is a state of constant size where it has one.
    - A *mask*, a *pattern*, or a program that is for prompts only runs as :func:`apply` runs it.
    - None, and layers that are not named, stay native, bit for bit.

    The model then trains, generates with its cache, with beams and in pieces, and is saved with its new weights by its own
    ``save_pretrained``; :func:`from_pretrained` brings it back. (Plain transformers would load the donor from there, and warn of weights
    it does not use.)

    Args:
        model: a transformers model with one stack of decoder layers, running ``sdpa``, ``eager`` or ``flex_attention``.
        layers: a mapping from layer index, as of :func:`sparsedsl.schedule`; or a function of the index; or one thing for all layers.
        init: how new parameters begin: ``"published"``, ``"calibrated"`` so that little changes, or None, as their constructors leave
            them. In float32 where the model has half precision: gates of slow slots are 1 in bfloat16.
        backend, allow: as in :func:`sparsedsl.compile`.

    Returns:
        :class:`Conversion`: what trains, what does not, the donor's outputs, and the way back.

    Raises:
        PatternError: no such layer, or what was given for it is nothing of the above.
        UnsupportedError: a module that is not made of projections and a rotation (its name and why), one that shares keys with others,
            a program without a place for the donor's sink logits or soft cap. Calls raise it for what :func:`apply` refuses.

    >>> import torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> handle = sd.models.convert(model, sd.schedule(4, 2, full=None, other=sd.models.NHA))
    >>> handle.freeze()
    >>> model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    >>> all(parameter.grad is not None for parameter in handle.new_parameters())
    True
    >>> handle.restore()
    """
    config = text_config(model)
    found = attention_layers(model)
    if any(hasattr(module, CONVERTED) for module in model.modules()):
        raise PatternError("this model is converted already; call sd.models.conversion(model).restore() first")
    if init is not None:
        check_word("convert(): init", init, ("published", "calibrated"))
    native = native_implementation(config, "layers are converted")
    layers_of, patterns = dict[int, tuple[Donor, Layer]](), dict[int, Any]()
    told, owners = is_told_causal(model, config), key_owners(found)
    for index, given in choose_layers(layers, sorted(found)).items():
        if is_pattern(given):
            patterns[index] = given
            continue
        module = found[index]
        if hasattr(module, BINDING):
            raise PatternError(
                f"layer {index} runs a pattern; call restore() on what models.apply returned (sd.models.applied(model) gives it), then "
                "convert"
            )
        if any((owner == index) != (reader == index) for reader, owner in owners.items()):
            raise UnsupportedError(
                f"layer {index} ({type(module).__name__}) shares its keys with other layers, which a converted layer would not keep for "
                "them; leave these layers as they are"
            )
        donor = donor_of(module, index, len(found), native_pattern(module, index, config, told))
        layers_of[index] = (donor, layer_for(given, donor))
    stack = Stack(owners, None, converts=True)
    conversion = Conversion(model, config, stack, dict(found))
    compiled = Compiled(backend, tuple(allow))
    made = dict[int, tuple[Converted, Layer]]()
    for index, (donor, layer) in layers_of.items():
        converted = Converted(donor, compiled, stack)
        converted.program(layer)  # refuses what has no place in the program, before anything is changed
        made[index] = (converted, layer)
    conversion._install(native, made, init)
    if patterns:
        conversion.applied = apply(model, patterns, backend=backend, allow=allow)
    return conversion


def conversion(model: PreTrainedModel) -> Conversion | None:
    """The handle of a converted model, or None: of one that was loaded or copied, or whose handle was not kept.

    >>> import copy, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny))
    >>> handle = sd.models.convert(model, {1: sd.models.MoBA})
    >>> sd.models.conversion(model) is handle, sd.models.conversion(copy.deepcopy(model)) is handle
    (True, False)
    """
    check_module(model)
    found: Conversion | None = vars(model).get(_HANDLE)
    return found


class Conversion:
    """A converted model's handle: what is new in it, what trains, and the way back. Made by :func:`convert`.

    ``layers``: layer index -> :class:`Layer`. ``applied``: the patterns among what was given (:class:`AppliedPatterns`), or None.
    """

    def __init__(self, model: PreTrainedModel, config: PreTrainedConfig, stack: Stack, found: dict[int, Any]) -> None:
        self.model, self.layers = model, dict[int, Layer]()
        self.applied: AppliedPatterns | None = None
        self._config, self._stack, self._found = config, stack, found
        self._modules: dict[int, Any] = {}
        self._hooks: list[Any] = []

    # ---- training ----------------------------------------------------------------------------------------------------------------

    def new_parameters(self) -> list[nn.Parameter]:
        """The parameters that the donor does not have."""
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    def freeze(self, also: Sequence[str] = ()) -> None:
        """Train the new parameters alone; ``also`` names modules of the converted layers' attention that train with them, such as
        ``("q_proj", "k_proj", "v_proj", "o_proj")``."""
        self.model.requires_grad_(False)
        for index, layer in self.layers.items():
            layer.requires_grad_(True)
            for name in also:
                part = getattr(self._modules[index], name, None)
                if not isinstance(part, nn.Module):
                    known = [word for word, _ in self._modules[index].named_children() if word != LAYER]
                    raise PatternError(f"freeze(): layer {index} has no module {name!r}; it has {', '.join(known)}")
                part.requires_grad_(True)

    def parameter_groups(self, lr: float = 1e-3, *, donor_lr: float = 1e-5, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Groups for an optimizer, of the parameters that train: new ones and the donor's, each with and without weight decay.

        Gates, biases, norms and factors get none: decay moves a gate of half-life 4096 to one of 66 in a thousand steps.

        >>> import sparsedsl as sd
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> handle = sd.models.convert(LlamaForCausalLM(LlamaConfig(**tiny)), {0: sd.models.NHA})
        >>> handle.freeze()
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in handle.parameter_groups(lr=0.01)]
        [(0.01, 0.0, 3)]
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        new = dict[int, bool]()
        for layer in self.layers.values():
            new |= {id(parameter): layer.decays(name) for name, parameter in layer.named_parameters()}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                rate = lr if id(parameter) in new else donor_lr
                decays = new.get(id(parameter), parameter.ndim > 1)
                groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
        return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]

    def teacher(self, layer: int) -> Teacher:
        """The donor's layer, to learn from: ``teacher(input_ids)`` runs the donor, and gives a :class:`Lesson` of what went into its layer
        and what came out. The student gets the same inputs, whatever other layers have become.

        >>> import torch, sparsedsl as sd
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> handle = sd.models.convert(LlamaForCausalLM(LlamaConfig(**tiny)), {1: sd.models.NHA})
        >>> lesson = handle.teacher(layer=1)(torch.arange(8)[None])
        >>> lesson.output.shape
        torch.Size([1, 8, 16])
        >>> lesson.loss().backward()  # relative squared error of what the converted layer gives
        """
        self._check_layer(layer)
        return Teacher(self.lessons, layer)

    def lessons(self, *inputs: Any, student: bool = False, **more: Any) -> dict[int, Lesson]:
        """Layer index -> lesson, of all converted layers, by one run of the donor on these inputs of the model. ``student``: by a run of
        the model as it is now, so that lessons have the inputs that its own layers get, and its own outputs: for the index of ``DSA``."""
        with contextlib.nullcontext() if student else self.identity():
            return lessons(self.model, self._modules, *inputs, **more)

    # ---- the donor, and the way back ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def identity(self) -> Iterator[None]:
        """Inside this block the converted layers run the donor's own forward, with the weights as they are now: bit for bit the donor as
        long as only new parameters were trained. (Masks and patterns that were given stay.) Caches begun outside do not go on inside."""
        before = {index: getattr(module, CONVERTED).off for index, module in self._modules.items()}
        native = self._stack.native
        self._switch(dict.fromkeys(before, True), None)
        try:
            yield
        finally:
            self._switch(before, native)

    def cache(self) -> Cache:
        """An empty cache for the model as it is now; for ``past_key_values=``. The one that ``generate()`` makes by itself does too."""
        cache = empty_cache(self.model) if self.applied is None else self.applied.cache()
        for index, module in self._modules.items():
            program_cache(cache, index, getattr(module, CONVERTED).program(self.layers[index]))
        return cache

    def restore(self) -> None:
        """Give the model its own attention back. New parameters go; what training did to the donor's stays. Doing so twice is no error."""
        if self.applied is not None:
            self.applied.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self._modules.values():
            module.__class__ = type(module).donor_class
            delattr(module, LAYER)
            delattr(module, CONVERTED)
        self._modules.clear()
        vars(self.model).pop(_HANDLE, None)
        vars(self._config).pop(NOTE, None)
        take_stack(self._config, self._stack)

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        groups: dict[str, list[int]] = {}
        for index, layer in self.layers.items():
            groups.setdefault(layer.words, []).append(index)
        words = [f"{layer_words(indices)} {text}" for text, indices in groups.items()]
        given = {} if self.applied is None else self.applied.patterns
        if self.applied is not None:
            words += [repr(self.applied).partition(": ")[2].partition("; native: ")[0].removesuffix(">")]
        left = [index for index in self._found if index not in self.layers and index not in given]
        others = [index for index in left if hasattr(self._found[index], BINDING)]
        words += [f"given patterns by an apply: {layer_words(others)}"] if others else []
        native = [index for index in left if index not in others]
        words += [f"native: {layer_words(native)}"] if native else []
        state = "" if self._modules or not self.layers else ", restored"
        return f"<Conversion of {type(self.model).__name__}{state}: {'; '.join(words)}>"

    # ---- inside --------------------------------------------------------------------------------------------------------------------

    def _install(self, native: str, made: Mapping[int, tuple[Converted, Layer]], init: str | None) -> None:
        entries = {str(index): entry_of(layer) for index, (_, layer) in made.items()}
        for index, (converted, layer) in made.items():
            module: Any = converted.donor.module
            weight = module.k_proj.weight
            layer.to(
                device=weight.device, dtype=torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
            )
            if init is not None:
                with torch.no_grad():
                    layer.init(converted.donor, init)
            layer.train(module.training)
            kind: Any = type(module)
            module.__class__ = converted_class(kind)
            setattr(module, LAYER, layer)
            setattr(module, CONVERTED, converted)
            self.layers[index], self._modules[index] = layer, module
        register_masks(native)
        put_stacks(self._config, native, (*stacks_of(self._config), self._stack))
        rest = {index: module for index, module in self._found.items() if index not in self.layers}
        self._stack.native = masks_of(rest, self._config, is_told_causal(self.model, self._config))
        if entries:
            setattr(self._config, NOTE, {"version": VERSION, "layers": entries})
        vars(self.model)[_HANDLE] = self
        base, running = self.model.base_model, _Running(self._stack, self._modules, native)
        for part in self.model.modules():
            if isinstance(part, PreTrainedModel) and (part is base or _holds(base, part, self._modules)):
                self._hooks.append(part.register_forward_pre_hook(running.before, with_kwargs=True))
                self._hooks.append(part.register_forward_hook(running.after, always_call=True))

    def _switch(self, off: Mapping[int, bool], native: Any) -> None:
        for index, value in off.items():
            if index in self._modules:
                getattr(self._modules[index], CONVERTED).off = value
        self._stack.native = native

    def _check_layer(self, layer: int) -> None:
        if layer not in self._modules:
            raise PatternError(
                f"layer {layer!r} is not a converted one; these are: {', '.join(map(str, self._modules)) or 'none'}"
            )


def _holds(outer: Any, part: Any, modules: Mapping[int, Any]) -> bool:
    """Whether a model inside of another has the converted layers, so that its forward makes their masks."""
    inside = set(map(id, part.modules()))
    return any(part is own for own in outer.modules()) and all(id(module) in inside for module in modules.values())


@dataclass(eq=False)
class _Running:
    """Hooks around every forward that may make the masks of converted layers. ``native``: the implementation that makes them."""

    stack: Stack
    modules: dict[int, Any]
    native: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register_masks(self.native)  # a pickle may be read by a process that has converted nothing

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Nothing has switched off what tells the layers of padding."""
        config = text_config(module)
        if torch.compiler.is_exporting():
            raise UnsupportedError(
                "converted layers have no form in an exported graph: their calls depend on padding and on what a cache holds. Export parts "
                "of the model, such as each layer's mlp, or the donor (handle.restore())"
            )
        self.stack.inside += 1
        if self.stack not in stacks_of(config):
            raise UnsupportedError(
                f"layers of this model are converted, but its attn_implementation was since set to {config._attn_implementation!r}, which "
                "would not tell them of padding; call restore() on what models.convert returned, set it, and convert again"
            )

    def after(self, module: Any, args: Any, output: Any) -> None:
        """Every converted layer has run, unless the forward failed before."""
        self.stack.inside = max(0, self.stack.inside - 1)
        if output is None or self.stack.inside or (module.training and getattr(text_config(module), "layerdrop", 0)):
            return
        converted = [getattr(one, CONVERTED) for one in self.modules.values()]
        if missed := [one.donor.layer_idx for one in converted if not (one.reached or one.off)]:
            raise UnsupportedError(
                f"{layer_words(missed)}: the forward ended, and the converted layer did not run. Leave it out of what is converted"
            )
