"""The test kit, for this project's patterns and for yours. Needs hypothesis: ``pip install 'sparsedsl[testing]'``."""

from __future__ import annotations

from sparsedsl.testing.shapes import AttentionCase, dtypes, inputs, shapes, tensor
from sparsedsl.testing.strategies import indices, masks, patterns, scores, tables_for

__all__ = ["AttentionCase", "dtypes", "indices", "inputs", "masks", "patterns", "scores", "shapes", "tables_for", "tensor"]
