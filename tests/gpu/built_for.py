"""For which targets a run builds a kernel: one of each kind. The others are a campaign.

sm_86 and sm_89, and sm_120 and sm_121, have the same instructions, shared memory and registers a thread; the two pairs have different
assemblers. All else of a target differs from every other.
"""

from __future__ import annotations

from typing import Any

import pytest

from sparsedsl.gpu.targets import TARGETS

__all__ = ["BUILT_FOR", "KINDS"]

KINDS = [name for name in TARGETS if name not in ("sm_89", "sm_120")]
BUILT_FOR: list[Any] = [name if name in KINDS else pytest.param(name, marks=pytest.mark.campaign) for name in TARGETS]
