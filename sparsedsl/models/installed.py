"""What lies in a model while patterns run in it: one object for all that was applied, however often.

It is an attribute of the module whose forward runs the layers, as the hooks are there and each layer's binding in the layer. So copies
and pickles of a model take it along, and have patterns of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, PreTrainedModel

from sparsedsl.errors import UnsupportedError
from sparsedsl.models.attention_function import attend
from sparsedsl.models.binding import BINDING, Binding
from sparsedsl.models.carried import Stack, calling, put_stacks, stacks_of, take_stack
from sparsedsl.models.layers import file_mentions, has_cross_attention, key_owners, mentions
from sparsedsl.models.mask_arguments import register_masks
from sparsedsl.models.native import masks_of
from sparsedsl.models.written import ATTRIBUTE, Tables, entry_of, put_note

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Installed", "home_of", "installed_at", "installed_in"]

_NAME = "sparsedsl"  # what bound modules call; for all else the model keeps the name it had
_INSTALLED = "_sparsedsl_installed"
# Continuous batching calls a model that runs eager by the second name, and sets it back to the first: the same implementation.
_EAGER = {"eager", "paged|eager"}


class Installed:
    """The patterns of one stack of layers. ``applied``: each handle that has not been restored -> what it has its layers run, oldest
    first. ``bindings``: layer index -> what the layer runs, which is what was applied to it last."""

    def __init__(self, home: PreTrainedModel, config: PreTrainedConfig, native: str, layers: dict[int, Any], told: bool) -> None:
        self.home, self.config, self.native, self.layers, self.told = home, config, native, layers, told
        self.stack, self._crosses = Stack(key_owners(layers), None), has_cross_attention(home)
        self.applied: dict[Any, dict[int, Binding]] = {}
        self.bindings: dict[int, Binding] = {}
        self._hooked: list[tuple[Any, Any, Any]] = []
        self._methods: list[tuple[Any, str]] = []
        self._noted_before = getattr(config, ATTRIBUTE, None) if not stacks_of(config) else None

    def add(self, handle: Any, bindings: dict[int, Binding]) -> None:
        """Let layers run these. The first handle changes the configuration, too."""
        if not self.applied:
            _register(self.native)
            put_stacks(self.config, self.native, (*stacks_of(self.config), self.stack))
            setattr(self.home, _INSTALLED, self)
        self.applied[handle] = bindings
        self._bind()

    @property
    def heads(self) -> int | None:
        """Of queries, in every layer."""
        return getattr(self.config, "num_attention_heads", None)

    def entries(self, tables: Tables) -> list[dict[str, Any]]:
        """What is written of all that was applied; the tensors it needs are added to ``tables``."""
        return [entry_of(type(self.home).__name__, handle, tables) for handle in self.applied]

    def put_method(self, name: str, root: PreTrainedModel, function: Callable[..., Any]) -> None:
        """Let ``function(model, ..)`` stand for a method of ``root`` and of the models between it and the layers."""
        for module in _models_between(root, self.home):
            if name not in vars(module) and hasattr(module, name):
                vars(module)[name] = functools.partial(function, module)
                self._methods.append((module, name))

    def hook(self, root: PreTrainedModel, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Call ``before(self, module, args, kwargs)`` and ``after(self, module, args, output)`` around every forward that may make the
        layers' masks: those of the models from ``root``'s base model to the one that the layers lie in."""
        for module in _models_between(root.base_model, self.home):
            if all(module is not hooked for hooked, *_ in self._hooked):
                blocks = mentions if module is self.home else file_mentions
                self.stack.may_have_blocks |= blocks(module, "block_sequence_ids")
                first = module.register_forward_pre_hook(functools.partial(before, self), with_kwargs=True)
                last = module.register_forward_hook(functools.partial(after, self), always_call=True)
                self._hooked.append((module, first, last))

    def remove(self, handle: Any) -> None:
        """Layers run what they ran without this handle; the last one gives the model back."""
        if handle not in self.applied:
            return
        del self.applied[handle]
        self._bind()
        if self.applied:
            return
        for _, first, last in self._hooked:
            first.remove()
            last.remove()
        for module, name in self._methods:
            vars(module).pop(name, None)
        self._hooked.clear()
        self._methods.clear()
        delattr(self.home, _INSTALLED)
        left = take_stack(self.config, self.stack)
        put_note(self.config, [stack.notes for stack in left])
        if self._noted_before is not None and not left:
            setattr(self.config, ATTRIBUTE, self._noted_before)

    def check_is_asked(self) -> None:
        """Refuse to go on where the model's implementation was set to one that asks for no patterns."""
        if self.stack in stacks_of(self.config):
            return
        asked = self.config._attn_implementation
        if {asked, self.native} <= _EAGER:
            put_stacks(self.config, asked, (*stacks_of(self.config), self.stack))
        else:
            raise UnsupportedError(
                f"the model has patterns, but its attn_implementation was since set to {self.config._attn_implementation!r}, which "
                "would ignore them; call restore() on what models.apply returned"
            )

    def _bind(self) -> None:
        self.bindings = {}
        for bindings in self.applied.values():
            self.bindings.update(bindings)
        view = calling(self.config, _NAME)
        for index, module in self.layers.items():
            if index in self.bindings:
                setattr(module, BINDING, self.bindings[index])
                module.config = view
            elif hasattr(module, BINDING):
                delattr(module, BINDING)
                module.config = self.config
        native = {index: module for index, module in self.layers.items() if index not in self.bindings}
        # What masks of an encoder's output say is not known here: they are all made, as they were.
        self.stack.native = None if self._crosses else masks_of(native, self.config, self.told)
        self.stack.notes = self.entries(Tables())
        put_note(self.config, [stack.notes for stack in stacks_of(self.config)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _register(self.native)  # a pickle may be read by a process that has applied nothing


def _register(native: str) -> None:
    AttentionInterface.register(_NAME, attend)
    register_masks(native)


def installed_at(home: PreTrainedModel) -> Installed | None:
    """What lies in the model that has the layers."""
    return vars(home).get(_INSTALLED)


def installed_in(model: PreTrainedModel) -> list[Installed]:
    """What lies in a model and in those inside it."""
    found = (vars(module).get(_INSTALLED) for module in model.modules())
    return [installed for installed in found if installed is not None]


def home_of(model: PreTrainedModel, layers: dict[int, Any]) -> PreTrainedModel:
    """The innermost transformers model that has all of these layers: its forward runs them."""
    wanted = {id(module) for module in layers.values()}
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= {id(part) for part in m.modules()}]
    return min(inner, key=lambda m: sum(1 for _ in m.modules()))


def _models_between(outer: PreTrainedModel, home: PreTrainedModel) -> list[PreTrainedModel]:
    """The transformers models that contain ``home``, from ``outer`` on; ``home`` is the last."""
    models = (m for m in outer.modules() if isinstance(m, PreTrainedModel))
    return [m for m in models if any(part is home for part in m.modules())] or [home]
