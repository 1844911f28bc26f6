"""A converted model from a folder: its donor by transformers, its layers by name, their weights from the same files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.models.converted import LAYER
from sparsedsl.models.converting import Conversion, convert
from sparsedsl.models.layers import text_config
from sparsedsl.models.registry import NOTE, VERSION, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["from_pretrained", "is_new", "load_layers"]

# What says where a folder or repository lies, to transformers' loader of models and to that of single files alike.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(
    folder: str | os.PathLike[str], model_class: Any = None, *, backend: str = "auto", **arguments: Any
) -> PreTrainedModel:
    """Load a model that was saved with converted layers: the model, its layers and their weights.

    The handle is ``sd.models.conversion(model)``. Plain transformers would load the donor, and report the new weights as unexpected.

    Args:
        folder: where ``model.save_pretrained(folder)`` has put it, or the name of a repository.
        model_class: a class of transformers; default that of the saved model.
        backend: as in :func:`convert`.
        arguments: as in transformers' ``from_pretrained``. New weights keep the dtype they were saved in.

    Raises:
        PatternError: the folder has no converted layers, or lacks weights of theirs, or has weights that nothing reads.
        UnsupportedError: a layer's class is not registered, or makes another program than the one that was saved.

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
    """
    place = {name: arguments[name] for name in _PLACE if name in arguments}
    if model_class is None:
        names = getattr(transformers.AutoConfig.from_pretrained(folder, **place), "architectures", None) or ["no class"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise UnsupportedError(
                f"{os.fspath(folder)!r} was saved by {names[0]}, which is no class of transformers; pass model_class="
            )
    if "output_loading_info" in arguments:
        raise UnsupportedError("output_loading_info=True returns a pair, and from_pretrained a model; leave it out")
    with _without_report():
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    lost = sorted({*info["missing_keys"], *(key for key in info["unexpected_keys"] if not is_new(key))})
    if lost:
        raise PatternError(f"{os.fspath(folder)!r}: weights that are missing or that nothing reads: {', '.join(lost[:8])}")
    if load_layers(model, folder, info["unexpected_keys"], place, backend=backend) is None:
        raise PatternError(
            f"{os.fspath(folder)!r} was saved without converted layers; load it with {type(model).__name__}.from_pretrained(...)"
        )
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers reports weights that it found no place for, and ours are among them; what else there is raises an error here."""

    def keep(record: logging.LogRecord) -> bool:
        return f".{LAYER}." not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def is_new(key: str) -> bool:
    """Whether a weight's name is that of a parameter which a converted layer brings."""
    return f".{LAYER}." in f".{key}"


def load_layers(
    model: PreTrainedModel, folder: str | os.PathLike[str], saved: Any, place: Mapping[str, Any], *, backend: str = "auto"
) -> Conversion | None:
    """Convert a loaded donor as its configuration says, and load what is new; None where it says nothing. ``saved``: names of the weights
    that transformers found no place for; ``place``: where the folder is, as transformers takes it."""
    note = vars(text_config(model)).get(NOTE)
    if note is None:
        return None
    if not isinstance(note, dict) or note.get("version") != VERSION:
        raise PatternError(
            f"config.{NOTE} is {str(note)[:80]!r}, and this sparsedsl reads version {VERSION}: it was written by another version, which "
            "can read it"
        )
    conversion = convert(
        model, {int(index): _Saved(entry) for index, entry in note["layers"].items()}, init=None, backend=backend
    )
    wanted = {name for name, _ in model.named_parameters() if is_new(name)} | {
        name for name, _ in model.named_buffers() if is_new(name)
    }
    found = {key for key in saved if is_new(key)}
    if wanted != found:
        raise PatternError(
            f"{os.fspath(folder)!r}: converted layers lack {', '.join(sorted(wanted - found)[:4]) or 'nothing'} and do not read "
            f"{', '.join(sorted(found - wanted)[:4]) or 'anything else'}; it was written by another version of them"
        )
    _read(model, folder, wanted, dict(place))
    return conversion


class _Saved:
    """Makes the layer that a configuration speaks of."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def __call__(self, donor: Any) -> Any:
        return layer_of(self.entry, donor)


def _read(model: PreTrainedModel, folder: str | os.PathLike[str], names: set[str], place: dict[str, Any]) -> None:
    """Read weights by name into a model."""
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **place)
    files = dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    if index is not None:
        with open(index, encoding="utf-8") as text:
            files = {name: file for name, file in json.load(text)["weight_map"].items() if name in names}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for file in sorted(set(files.values())):
        path = cached_file(folder, file, **place)
        with safe_open(path, framework="pt") as opened, torch.no_grad():
            for name in (name for name, where in files.items() if where == file):
                value, own = opened.get_tensor(name), tensors[name]
                if value.shape != own.shape:
                    raise PatternError(f"{os.fspath(folder)!r}: {name} has shape {tuple(value.shape)}; wanted {tuple(own.shape)}")
                own.data = value.to(own.device)
