"""A model with its patterns from a folder: :func:`from_pretrained`."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import cached_file

from sparsedsl.errors import PatternError, TableError, UnsupportedError
from sparsedsl.models.applying import apply
from sparsedsl.models.layers import text_config
from sparsedsl.models.saving import MARK
from sparsedsl.models.written import ATTRIBUTE, TABLES_FILE, entries_in, given_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["from_pretrained"]

# What says where a folder or repository lies, to transformers' loader of models and to that of single files alike.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(
    folder: str | os.PathLike[str],
    model_class: Any = None,
    *,
    backend: str | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Load a model that was saved with patterns, and apply them: ``sd.models.applied(model)`` has the handles.

    Args:
        folder: where ``model.save_pretrained(folder)`` has put it, or the name of a repository.
        model_class: a class of transformers, such as ``LlamaForCausalLM`` or ``AutoModelForCausalLM``; default that of the saved model.
        backend: as in :func:`apply`; default what was applied when the model was saved.
        arguments: as in transformers' ``from_pretrained`` (``dtype=``, ``device_map=``, ``attn_implementation=``, ..).

    Raises:
        PatternError: the folder has no patterns, or they are none that this version reads; the class has no such layers.
        TableError: tensors that the patterns read are missing.
        UnsupportedError: as :func:`apply`; or the saved class is none of transformers.

    transformers' report of weights that were not used or not found is shown as ever.

    >>> import tempfile, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny))
    >>> with tempfile.TemporaryDirectory() as folder, sd.models.apply(model, {1: sd.kv_idx <= sd.q_idx}):
    ...     model.save_pretrained(folder)
    ...     again = sd.models.from_pretrained(folder)
    >>> sd.models.applied(again)[0]
    <AppliedPatterns on LlamaForCausalLM: layer 1 attend(q_idx >= kv_idx); native: layer 0>
    """
    kind = _saved_class(folder, arguments) if model_class is None else model_class
    model = _loaded(kind, folder, arguments)
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, transformers.PreTrainedModel)}
    entries = [entry for config in configs.values() for entry in entries_in(config)]
    if not entries:
        raise PatternError(
            f"{os.fspath(folder)!r} was saved without patterns: its config.json has no {ATTRIBUTE!r}. Load it with "
            f"{type(model).__name__}.from_pretrained(...), then call sd.models.apply(model, patterns)"
        )
    tensors = _tensors(folder, entries, arguments)
    for config in configs.values():
        vars(config).pop(ATTRIBUTE, None)  # what is applied writes it anew
    for entry in entries:
        given = given_of(entry, tensors)
        apply(_part(model, entry["stack"]), given, backend=backend or entry["backend"], allow=entry["allow"])
    return model


def _saved_class(folder: str | os.PathLike[str], arguments: dict[str, Any]) -> Any:
    place = {name: arguments[name] for name in _PLACE if name in arguments}
    names = getattr(transformers.AutoConfig.from_pretrained(folder, **place), "architectures", None) or ["no class"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise UnsupportedError(
            f"{os.fspath(folder)!r} was saved by {names[0]}, which is no class of transformers; pass it: from_pretrained(folder, TheClass)"
        )
    return kind


def _loaded(kind: Any, folder: str | os.PathLike[str], arguments: dict[str, Any]) -> PreTrainedModel:
    """The native model. Of transformers' report only the line about our mark is not wanted here."""
    logger, kept = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        if MARK not in record.getMessage():
            return True
        kept.append(record)
        return False

    wants_info = arguments.pop("output_loading_info", False)
    if wants_info:
        raise UnsupportedError("output_loading_info=True returns a pair, and from_pretrained a model; leave it out")
    logger.addFilter(hold)
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    finally:
        logger.removeFilter(hold)
    unexpected = sorted(set(info["unexpected_keys"]) - {MARK})
    lost = {
        "not used": unexpected,
        "not found": sorted(info["missing_keys"]),
        "of another shape": sorted(info["mismatched_keys"]),
    }
    words = [f"{what}: {', '.join(map(str, keys[:8]))}" for what, keys in lost.items() if keys]
    if kept and words:
        warnings.warn(f"weights of {os.fspath(folder)!r} that were {'; '.join(words)}", stacklevel=3)
    return model


def _tensors(folder: str | os.PathLike[str], entries: list[dict[str, Any]], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the entries' tables are bound to."""
    wanted = {stored: name for entry in entries for names in entry["tables"].values() for name, stored in names.items()}
    if not wanted:
        return {}
    place = {name: arguments[name] for name in _PLACE if name in arguments}
    path = cached_file(folder, TABLES_FILE, _raise_exceptions_for_missing_entries=False, **place)
    tensors = {} if path is None else load_file(path)
    missing = sorted({name for stored, name in wanted.items() if stored not in tensors})
    if missing:
        raise TableError(
            f"{os.fspath(folder)!r} has no tensor for the table{'s' * (len(missing) > 1)} {', '.join(missing)}: they lie in {TABLES_FILE}. "
            "Where patterns were given to a part of a model, save the whole with sd.models.save_pretrained(model, folder)"
        )
    return tensors


def _part(model: PreTrainedModel, stack: str) -> PreTrainedModel:
    """The part of a model to apply an entry to: all of it, where it has one stack of layers and that is the one."""
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel) and type(part).__name__ == stack]
    if len(parts) != 1:
        raise PatternError(
            f"the patterns were saved for the layers of a {stack}, of which {type(model).__name__} has {len(parts) or 'none'}; load the "
            "class that was saved (model_class=None), or load natively and call sd.models.apply(model, patterns)"
        )
    whole = model.config.get_text_config() is parts[0].config and not getattr(model.config, "is_encoder_decoder", False)
    return model if whole and text_config(model) is parts[0].config else parts[0]
