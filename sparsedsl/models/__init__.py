"""Patterns in the attention layers of transformers models: :func:`native_patterns`, :func:`apply`, :func:`search`.

The stages of one call, and the module of each:

1. ``layers``: model -> its attention modules by layer index.
2. ``native``: module and config -> the pattern the model was made with.
3. ``mask_arguments``: what transformers would turn into a mask tensor (padding, packing, cache offsets) -> a :class:`MaskRequest`.
4. ``carried``: the request beside the mask, on its way to the layers; everything else sees transformers' own masks.
5. ``derived``: pattern + what the request holds -> the pattern that runs, and its tables.
6. ``binding``: what a layer runs. ``attention_function``: query, key, value of one layer + request -> output; for programs on the real
   tokens of each row: ``sequences``.
   In continuous batching, where keys lie in a paged cache: ``continuous``.
7. ``given``, ``installed``, ``applying``: what each layer is given, and 1-6 put into a model and taken out again.
8. ``written``, ``saving``, ``loading``: patterns as text in a saved model's configuration, and a model with its patterns from there.

Layers that become hybrid layers (:func:`convert`) take the place of stages 5 and 6:

- ``donor``: an attention module -> its facts, its queries, keys and values before and after rotation.
- ``layer``: what a hybrid layer is; ``hybrids``: those that are shipped; ``registry``: their names, and users' own, in saved models.
- ``converted``: the forward of a converted module; ``program_cache``: what it keeps between calls; ``row_shares``: of which rows.
- ``converting``: puts them into a model; ``teaching``: what they learn from the donor (``index_learning``: what an index does);
  ``layers_loading``: their weights from a folder.

``layer_search`` finds which layer gets which of them.
"""

from __future__ import annotations

from sparsedsl.errors import MissingPackageError

try:
    import transformers as _
except ModuleNotFoundError as error:
    raise MissingPackageError("sparsedsl.models", "transformers", "models") from error

from sparsedsl.lang.advice import answer_for, public_only
from sparsedsl.models.applying import AppliedPatterns, applied, apply
from sparsedsl.models.converting import Conversion, conversion, convert
from sparsedsl.models.donor import Donor
from sparsedsl.models.hybrids.dsa import DSA
from sparsedsl.models.hybrids.gated_delta import GatedDelta
from sparsedsl.models.hybrids.hsa import HSA
from sparsedsl.models.hybrids.lolcats import LoLCATs
from sparsedsl.models.hybrids.moba import MoBA
from sparsedsl.models.hybrids.nha import NHA
from sparsedsl.models.hybrids.nsa import NSA
from sparsedsl.models.hybrids.ring_linear import RingLinear
from sparsedsl.models.layer import Layer
from sparsedsl.models.layer_search.bounds import Kl, Perplexity
from sparsedsl.models.layer_search.search_report import SearchReport
from sparsedsl.models.layer_search.searching import search
from sparsedsl.models.loading import from_pretrained
from sparsedsl.models.native import left_padding, native_patterns, sinks
from sparsedsl.models.program_cache import ProgramCacheLayer
from sparsedsl.models.registry import register_layer
from sparsedsl.models.saving import save_pretrained
from sparsedsl.models.teaching import Lesson

__all__ = [
    "DSA",
    "HSA",
    "NHA",
    "NSA",
    "AppliedPatterns",
    "Conversion",
    "Donor",
    "GatedDelta",
    "Kl",
    "Layer",
    "Lesson",
    "LoLCATs",
    "MoBA",
    "Perplexity",
    "ProgramCacheLayer",
    "RingLinear",
    "SearchReport",
    "applied",
    "apply",
    "conversion",
    "convert",
    "from_pretrained",
    "left_padding",
    "native_patterns",
    "register_layer",
    "save_pretrained",
    "search",
    "sinks",
]

answer_for(globals(), __all__)
__getattr__, __dir__ = public_only(__name__, __all__)
