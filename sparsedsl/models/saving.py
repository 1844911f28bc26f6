"""Saving a model with its patterns: transformers' ``save_pretrained``, and the tensors that patterns read beside the weights."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from sparsedsl.errors import ArgumentError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.models.installed import installed_in
from sparsedsl.models.layers import check_model
from sparsedsl.models.written import ATTRIBUTE, TABLES_FILE, Tables, given_of, put_note

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MARK", "save", "save_pretrained"]

# A weight that no model has: whoever loads the folder without patterns reads its name in transformers' report of unexpected keys.
MARK = "sparsedsl.these_weights_ran_with_patterns.load_them_with_sd_models_from_pretrained"


def save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **arguments: Any) -> None:
    """Save a model as transformers does, with the patterns that are applied to it or to parts of it.

    A model that was given to :func:`apply` does this when its own ``save_pretrained`` is called, too. (Where only a part was given, an
    encoder say, the whole model's own ``save_pretrained`` writes the patterns, but not the tensors bound to their tables.)

    The patterns stand as text in ``config.json``, under ``sparsedsl``: no code. Tensors bound to tables go into ``sparsedsl.safetensors``
    beside the weights. :func:`from_pretrained` gives the model back with its patterns. transformers' own ``from_pretrained`` knows of none
    and loads the native model; so that this is not silent, one more weight is written whose name says it, and transformers reports it
    as unexpected.

    Args:
        model: any transformers model. save_directory, and all other arguments: as in ``model.save_pretrained``.

    Raises:
        PatternError, ArgumentError: no transformers model, or no path.
        UnsupportedError: a table is bound to something else than a tensor; or ``push_to_hub=True`` with bound tables.

    >>> import tempfile, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny))
    >>> handle = sd.models.apply(model, {1: sd.kv_idx <= sd.q_idx})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sd.models.save_pretrained(model, folder)
    ...     sd.models.applied(sd.models.from_pretrained(folder))[0].patterns
    {1: <Pattern attend(kv_idx <= q_idx)>}
    """
    check_model(model)
    if not isinstance(save_directory, (str, os.PathLike)):
        raise ArgumentError(f"save_pretrained(): save_directory must be the path of a folder; got {shown(save_directory)}")
    save(model, save_directory, *args, **arguments)


def save(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **arguments: Any) -> None:
    """What :func:`save_pretrained` does, under a name that pickles of models with patterns refer to."""
    native = inspect.signature(type(model).save_pretrained).bind(model, save_directory, *args, **arguments)
    found, tables = installed_in(model), Tables()
    if not found or getattr(
        model, "_hf_peft_config_loaded", False
    ):  # of a model with adapters, transformers saves the adapters only
        type(model).save_pretrained(*native.args, **native.kwargs)
        return
    entries = [(installed.config, installed.entries(tables)) for installed in found]
    _check_that_all_reads_back([entry for _, written in entries for entry in written], tables)
    if tables.tensors and native.arguments.get("push_to_hub"):
        raise UnsupportedError(
            f"push_to_hub=True would upload the folder without {TABLES_FILE}; save into a folder, then upload that, or call "
            "model.push_to_hub(...)"
        )
    weights = native.arguments.get("state_dict")
    native.arguments["state_dict"] = {**(model.state_dict() if weights is None else weights), MARK: torch.zeros(1)}
    before = [(config, getattr(config, ATTRIBUTE)) for config, _ in entries]
    try:
        for config, _ in entries:
            put_note(config, [written for other, written in entries if other is config])
        type(model).save_pretrained(*native.args, **native.kwargs)
    finally:
        for config, note in before:
            setattr(config, ATTRIBUTE, note)
    if tables.tensors and native.arguments.get("is_main_process", True):
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tables.tensors.items()}
        save_file(tensors, Path(save_directory) / TABLES_FILE)


def _check_that_all_reads_back(entries: list[dict[str, Any]], tables: Tables) -> None:
    for entry in entries:
        for index, given in given_of(entry, tables.tensors).items():
            if given.text != entry["layers"][str(index)]:
                raise UnsupportedError(
                    f"layer {index}: its text form does not read back as it is, and would be another pattern when it is loaded: "
                    f"{entry['layers'][str(index)][:200]!r}; restore() it before saving"
                )
