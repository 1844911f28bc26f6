"""Patterns in the attention layers of transformers models: :func:`native_patterns`, :func:`apply`.

The stages of one call, and the module of each:

1. ``layers``: model -> its attention modules by layer index.
2. ``native``: module and config -> the pattern the model was made with.
3. ``mask_arguments``: what transformers would turn into a mask tensor (padding, packing, cache offsets) -> a :class:`MaskRequest`.
4. ``carried``: the request beside the mask, on its way to the layers; everything else sees transformers' own masks.
5. ``derived``: pattern + what the request holds -> the pattern that runs, and its tables.
6. ``attention_function``: query, key, value of one layer + request -> output; for programs on the real tokens of each row: ``sequences``.
7. ``applying``: puts 1-6 into a model, and takes them out again.
"""

from __future__ import annotations

from sparsedsl.errors import MissingPackageError

try:
    import transformers as _
except ModuleNotFoundError as error:
    raise MissingPackageError("sparsedsl.models", "transformers", "models") from error

from sparsedsl.lang.advice import answer_for
from sparsedsl.models.applying import AppliedPatterns, apply
from sparsedsl.models.native import left_padding, native_patterns, sinks

__all__ = ["AppliedPatterns", "apply", "left_padding", "native_patterns", "sinks"]

answer_for(globals(), __all__)
