"""The test kit, for this project's patterns, for yours, and for attention kernels of your own. Needs hypothesis, which the extra
``testing`` brings.

*Strategies* draw what the language can say (:func:`indices`, :func:`masks`, :func:`scores`, :func:`patterns`, :func:`programs`),
tables that keep their declarations (:func:`tables_for`), inputs of programs (:func:`program_inputs`), and shapes and inputs of
attention calls (:func:`shapes`, :func:`dtypes`, :func:`inputs`). *Assertions* state what must hold of any of them. A failed one
raises :class:`Counterexample`, whose ``snippet`` is a program that fails in the same way.
:func:`check` runs everything on one pattern. :class:`Kernel` is a kernel of your own, with what it implements: :func:`check` tests it too
(docs/testing.md).

>>> import sparsedsl as sd
>>> from hypothesis import given
>>> @given(sd.testing.masks(), sd.testing.shapes(max_len=9))
... def test_negation(mask, case):
...     sd.testing.assert_text_round_trip(~mask)
"""

from __future__ import annotations

from sparsedsl.errors import MissingPackageError

try:
    import hypothesis as _
except ModuleNotFoundError as error:
    raise MissingPackageError("sparsedsl.testing", "hypothesis", "testing") from error

from sparsedsl.lang.advice import answer_for, public_only
from sparsedsl.testing.battery import check
from sparsedsl.testing.behaviour import assert_causal, assert_equivariant, assert_prefill_equals_decode
from sparsedsl.testing.call_shapes import AttentionCase, dtypes, inputs, shapes, tensor
from sparsedsl.testing.counterexamples import Counterexample
from sparsedsl.testing.expression_checks import assert_same_values, assert_text_round_trip
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.kernel_check import assert_kernel
from sparsedsl.testing.kernels.kernel_report import KernelFinding, KernelReport
from sparsedsl.testing.kernels.kernel_tests import kernel_test
from sparsedsl.testing.list_checks import allowed_pairs, assert_lists_sound
from sparsedsl.testing.matching import assert_matches_reference
from sparsedsl.testing.pattern_report import LayerReports, Property, Report
from sparsedsl.testing.program_inputs import program_inputs
from sparsedsl.testing.program_properties import (
    assert_permutation_invariant,
    assert_unselected_gradients_zero,
    assert_weights_sum,
)
from sparsedsl.testing.program_strategies import programs
from sparsedsl.testing.strategies import indices, masks, patterns, scores, tables_for
from sparsedsl.testing.unseen_checks import assert_unseen_keys_have_no_effect

__all__ = [
    "AttentionCase",
    "Counterexample",
    "Kernel",
    "KernelCase",
    "KernelFinding",
    "KernelReport",
    "LayerReports",
    "Property",
    "Report",
    "allowed_pairs",
    "assert_causal",
    "assert_equivariant",
    "assert_kernel",
    "assert_lists_sound",
    "assert_matches_reference",
    "assert_permutation_invariant",
    "assert_prefill_equals_decode",
    "assert_same_values",
    "assert_text_round_trip",
    "assert_unseen_keys_have_no_effect",
    "assert_unselected_gradients_zero",
    "assert_weights_sum",
    "check",
    "dtypes",
    "indices",
    "inputs",
    "kernel_test",
    "masks",
    "patterns",
    "program_inputs",
    "programs",
    "scores",
    "shapes",
    "tables_for",
    "tensor",
]

answer_for(globals(), __all__)
__getattr__, __dir__ = public_only(__name__, __all__)
