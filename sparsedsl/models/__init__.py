"""Patterns in the attention layers of transformers models: :func:`native_patterns`, :func:`apply`, :func:`search`.

The stages of one call, and the module of each:

1. ``layers``: model -> its attention modules by layer index.
2. ``native``: module and config -> the pattern the model was made with.
3. ``masks``: what transformers would turn into a mask tensor (padding, packing, cache offsets) -> a :class:`MaskRequest`.
4. ``carried``: the request beside the mask, on its way to the layers; everything else sees transformers' own masks.
5. ``derived``: pattern + what the request holds -> the pattern that runs, and its tables.
6. ``attention``: query, key, value of one layer + request -> output.
7. ``applying``: puts 1-6 into a model, and takes them out again.

``layer_search`` finds which layer gets which pattern.
"""

from __future__ import annotations

from sparsedsl.errors import MissingPackageError

try:
    import transformers as _
except ModuleNotFoundError as error:
    raise MissingPackageError("sparsedsl.models", "transformers", "models") from error

from sparsedsl.lang.advice import answer_for
from sparsedsl.models.applying import AppliedPatterns, apply
from sparsedsl.models.layer_search.bounds import Kl, Perplexity
from sparsedsl.models.layer_search.search_report import SearchReport
from sparsedsl.models.layer_search.searching import search
from sparsedsl.models.native import left_padding, native_patterns, sinks

__all__ = [
    "AppliedPatterns",
    "Kl",
    "Perplexity",
    "SearchReport",
    "apply",
    "left_padding",
    "native_patterns",
    "search",
    "sinks",
]

answer_for(globals(), __all__)
