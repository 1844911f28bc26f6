"""Patterns in the attention layers of transformers models: :func:`native_patterns`, :func:`apply`.

The stages of one call, and the module of each:

1. ``layers``: model -> its attention modules by layer index.
2. ``native``: module and config -> the pattern the model was made with.
3. ``masks``: what transformers would turn into a mask tensor (padding, packing, cache offsets) -> a :class:`MaskRequest`.
4. ``carried``: the request beside the mask, on its way to the layers; everything else sees transformers' own masks.
5. ``derived``: pattern + what the request holds -> the pattern that runs, and its tables.
6. ``attention``: query, key, value of one layer + request -> output.
7. ``given``, ``installed``, ``applying``: what each layer is given, and 1-6 put into a model and taken out again.
8. ``written``, ``saving``, ``loading``: patterns as text in a saved model's configuration, and a model with its patterns from there.
"""

from __future__ import annotations

from sparsedsl.errors import MissingPackageError

try:
    import transformers as _
except ModuleNotFoundError as error:
    raise MissingPackageError("sparsedsl.models", "transformers", "models") from error

from sparsedsl.lang.advice import answer_for
from sparsedsl.models.applying import AppliedPatterns, applied, apply
from sparsedsl.models.loading import from_pretrained
from sparsedsl.models.native import left_padding, native_patterns, sinks
from sparsedsl.models.saving import save_pretrained

__all__ = [
    "AppliedPatterns",
    "applied",
    "apply",
    "from_pretrained",
    "left_padding",
    "native_patterns",
    "save_pretrained",
    "sinks",
]

answer_for(globals(), __all__)
