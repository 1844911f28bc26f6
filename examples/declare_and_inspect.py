"""What do I know about my pattern before anything runs?

Declares a hybrid pattern in three lines, reads its report, and lets the analysis find the future-token leak of a wrong version.

    python examples/declare_and_inspect.py
"""

from __future__ import annotations

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

causal = kv_idx <= q_idx
local = q_idx - kv_idx < 512
hybrid = causal & (local | (kv_idx < 4) | (kv_idx % 64 == 0))  # a window, four sinks, and every 64th key


def main() -> None:
    """Print what is known about the pattern."""
    print("The pattern, simplified:\n ", hybrid)
    print("\nIts report at 16K tokens:\n", sd.analyse(hybrid, 16_384), sep="")

    forgotten = local | (kv_idx < 4)  # `causal &` was forgotten
    verdict = sd.analyse(forgotten, 16_384).causal
    print("\nWithout `causal &`:", verdict)
    assert str(verdict).startswith("REFUTED")

    library = sd.patterns.streaming_llm(window=512, sink_count=4)
    print("Are these sinks and this window the library's streaming_llm?", sd.equivalent(causal & forgotten, library))
    print("Does the hybrid keep everything that streaming_llm keeps?", sd.implies(library, hybrid))


if __name__ == "__main__":
    main()
