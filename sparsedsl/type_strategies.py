"""Hypothesis draws masks, scores and patterns for arguments of these types: ``@given(...)`` with ``mask: sd.Mask``, ``st.from_type``.

Called by Hypothesis when it is imported (its entry point of the group "hypothesis"), and when a name such as ``sd.Mask`` is first used.
Whichever comes first, the strategies themselves, and torch with them, load when something is drawn.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["TYPES", "register"]

# Public name -> the module that defines it, and the strategy that draws it.
TYPES = {
    "Index": ("sparsedsl.lang.expressions", "indices"),
    "Mask": ("sparsedsl.lang.expressions", "masks"),
    "Score": ("sparsedsl.lang.expressions", "scores"),
    "Pattern": ("sparsedsl.lang.pattern", "patterns"),
    "Program": ("sparsedsl.program.graph", "programs"),
}
_registered: set[str] = set()


def register() -> None:
    """Tell Hypothesis of those types that are loaded, if it is loaded itself; of each once."""
    if "hypothesis" not in sys.modules:
        return
    from hypothesis import strategies

    for name, (module, strategy) in TYPES.items():
        if module in sys.modules and name not in _registered and hasattr(sys.modules[module], name):
            _registered.add(name)
            strategies.register_type_strategy(getattr(sys.modules[module], name), _drawn_by(strategy))


def _drawn_by(strategy: str) -> Any:
    def draw(_: type) -> Any:
        import sparsedsl.testing as testing

        return getattr(testing, strategy)()

    return draw
