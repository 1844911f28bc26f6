"""One pattern, written once, handed to engines that hold masks in forms of their own: exact, or refused with the reason.

Every function takes a pattern, lengths and tables as :func:`sparsedsl.analyse` does and gives a frozen object: tensors by the engine's
names, ``args`` for the engine's call, ``bytes``, ``read_at`` (the version whose semantics it follows) and ``to_mask()``, which decodes
the tensors and never evaluates the pattern. :func:`fits` says what holds a pattern, and in how many bytes.

No engine is installed or needed, and no engine's kernel was run: what is tested is that the encodings, read by the rules that the
engines' sources and documentation state, are the mask. docs/export.md has the engines, their conditions and their traps.

>>> import sparsedsl as sd
>>> export = sd.export.cudnn(sd.patterns.causal(), 4)
>>> export.mask_func.tolist(), export.to_mask().sum().item()
([[[1, 2, 3, 4]]], 10)
"""

from __future__ import annotations

from sparsedsl.export.cudnn_rows import CudnnRows, cudnn
from sparsedsl.export.exported import Exported
from sparsedsl.export.fitting import Fits, fits
from sparsedsl.export.flash_lists import FlashLists
from sparsedsl.export.flash_windows import FlashWindow, flash_attention
from sparsedsl.export.flashinfer_blocks import FlashInferBlocks, flashinfer
from sparsedsl.export.flashmask_columns import FlashMaskColumns, flashmask
from sparsedsl.export.magi_slices import MagiSlices, magi
from sparsedsl.export.natten_grid import Axis, NattenGrid, natten
from sparsedsl.export.paged_requests import PagedRequests, flashinfer_paged
from sparsedsl.export.splash_blocks import SplashMask, splash
from sparsedsl.export.xformers_bias import XformersBias, xformers
from sparsedsl.lang.advice import answer_for, public_only

__all__ = [
    "Axis",
    "CudnnRows",
    "Exported",
    "Fits",
    "FlashInferBlocks",
    "FlashLists",
    "FlashMaskColumns",
    "FlashWindow",
    "MagiSlices",
    "NattenGrid",
    "PagedRequests",
    "SplashMask",
    "XformersBias",
    "cudnn",
    "fits",
    "flash_attention",
    "flashinfer",
    "flashinfer_paged",
    "flashmask",
    "magi",
    "natten",
    "splash",
    "xformers",
]

answer_for(globals(), __all__)
__getattr__, __dir__ = public_only(__name__, __all__)
