"""A model with its converted layers and its patterns from a folder: :func:`from_pretrained`."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import cached_file

from sparsedsl.errors import ArgumentError, PatternError, TableError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.models.applying import apply
from sparsedsl.models.converted import LAYER
from sparsedsl.models.layers import text_config
from sparsedsl.models.layers_loading import is_new, load_layers
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
    """Load a model that was saved with converted layers or with patterns: the model, its layers and their weights, its patterns.

    ``sd.models.conversion(model)`` is the handle of its layers, ``sd.models.applied(model)`` has those of its patterns. (Plain transformers
    would load the donor or the native model, and report what it does not know as unexpected weights.)

    Args:
        folder: where ``model.save_pretrained(folder)`` has put it, or the name of a repository.
        model_class: a class of transformers, such as ``LlamaForCausalLM`` or ``AutoModelForCausalLM``; default that of the saved model.
        backend: as in :func:`convert` and :func:`apply`; default "auto" for layers, and for patterns what they ran on when they were saved.
        arguments: as in transformers' ``from_pretrained`` (``dtype=``, ``device_map=``, ``attn_implementation=``, ..). New weights of
            converted layers keep the dtype they were saved in.

    Raises:
        ArgumentError: no path, or no class.
        PatternError: the folder has neither, or what no version like this one reads; the class has no such layers; converted layers lack
            weights, or weights are missing or unread in a model that has some.
        TableError: tensors that the patterns read are missing.
        UnsupportedError: as :func:`apply`; the saved class is none of transformers; a layer's class is not registered, or makes another
            program than the one that was saved.

    >>> import tempfile, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> handle = sd.models.convert(model, {1: sd.models.NHA})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     again = sd.models.from_pretrained(folder)
    >>> sd.models.conversion(again)
    <Conversion of LlamaForCausalLM: layer 1 NHA(slots=32, window=32, first=1, slot_bias=-6.0, temperature=8.0); native: layer 0>
    >>> ids = torch.arange(8)[None]
    >>> torch.equal(model(ids).logits, again(ids).logits)
    True
    >>> handle.restore()
    >>> with tempfile.TemporaryDirectory() as folder, sd.models.apply(model, {1: sd.kv_idx <= sd.q_idx}):
    ...     model.save_pretrained(folder)
    ...     again = sd.models.from_pretrained(folder)
    >>> sd.models.applied(again)[0]
    <AppliedPatterns on LlamaForCausalLM: layer 1 attend(kv_idx <= q_idx); native: layer 0>
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(f"from_pretrained(): folder must be a path or the name of a repository; got {shown(folder)}")
    if model_class is not None and not hasattr(model_class, "from_pretrained"):
        raise ArgumentError(
            f"from_pretrained(): model_class must be a class of transformers, such as AutoModelForCausalLM; got {shown(model_class)}"
        )
    place = {name: arguments[name] for name in _PLACE if name in arguments}
    kind = _saved_class(folder, place) if model_class is None else model_class
    model, info = _loaded(kind, folder, arguments)
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, transformers.PreTrainedModel)}
    entries = [entry for config in configs.values() for entry in entries_in(config)]
    tensors = _tensors(folder, entries, place)
    for config in configs.values():
        vars(config).pop(ATTRIBUTE, None)  # what is applied writes it anew
    converted = load_layers(model, folder, info["unexpected_keys"], place, backend=backend or "auto")
    if converted is None and not entries:
        raise PatternError(
            f"{os.fspath(folder)!r} was saved without patterns and without converted layers: its config.json has no {ATTRIBUTE!r}. Load it "
            f"with {type(model).__name__}.from_pretrained(...), then call sd.models.apply(model, patterns)"
        )
    lost = sorted({*info["missing_keys"], *(key for key in info["unexpected_keys"] if key != MARK and not is_new(key))})
    if converted is not None and lost:
        raise PatternError(f"{os.fspath(folder)!r}: weights that are missing or that nothing reads: {', '.join(lost[:8])}")
    for entry in entries:
        words = {"backend": backend or entry["backend"], "allow": entry["allow"], "indices": entry["indices"]}
        apply(_part(model, entry["stack"]), given_of(entry, tensors), **words)
    return model


def _saved_class(folder: str | os.PathLike[str], place: dict[str, Any]) -> Any:
    names = getattr(transformers.AutoConfig.from_pretrained(folder, **place), "architectures", None) or ["no class"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise UnsupportedError(
            f"{os.fspath(folder)!r} was saved by {names[0]}, which is no class of transformers; pass it: from_pretrained(folder, TheClass)"
        )
    return kind


def _loaded(kind: Any, folder: str | os.PathLike[str], arguments: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """The native model, and which weights found no place. Of transformers' report the lines about what is ours are not wanted here."""
    logger, kept = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        if MARK not in record.getMessage() and f".{LAYER}." not in record.getMessage():
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
    unexpected = sorted(key for key in info["unexpected_keys"] if key != MARK and not is_new(key))
    lost = {
        "not used": unexpected,
        "not found": sorted(info["missing_keys"]),
        "of another shape": sorted(info["mismatched_keys"]),
    }
    words = [f"{what}: {', '.join(map(str, keys[:8]))}" for what, keys in lost.items() if keys]
    if kept and words:
        warnings.warn(f"weights of {os.fspath(folder)!r} that were {'; '.join(words)}", stacklevel=3)
    return model, info


def _tensors(folder: str | os.PathLike[str], entries: list[dict[str, Any]], place: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the entries' tables are bound to."""
    wanted = {stored: name for entry in entries for names in entry["tables"].values() for name, stored in names.items()}
    if not wanted:
        return {}
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
