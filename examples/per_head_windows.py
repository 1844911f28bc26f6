"""How do I give every head its own window?

A count may be an expression: a table of windows read at ``h``. The tile lists then differ from head to head.

    python examples/per_head_windows.py
"""

from __future__ import annotations

import torch

import sparsedsl as sd

WINDOWS = torch.tensor([64, 128, 512, 4096])


def main() -> None:
    """Show the pattern and what each head costs."""
    window = sd.table("window", values_in=(1, 4096))
    pattern = sd.patterns.sliding_window(window[sd.h]) | sd.patterns.sinks(4)
    print(pattern.text)

    report = sd.analyse(pattern, 4096, heads=len(WINDOWS), window=WINDOWS)
    assert isinstance(report, sd.Analysis)  # of a mask; programs have a report of their own, without lists
    lists = report.lists
    for head, size in enumerate(WINDOWS.tolist()):
        full, partial = (int(kind.counts[0, head].sum()) for kind in (lists.full, lists.partial))
        print(f"head {head}, window {size:5}: {full:4} full tiles, {partial:4} partial")

    q, k, v = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)  # 2 key heads for 4
    out = sd.compile(pattern, backend="reference")(q, k, v, window=WINDOWS)
    print("output", tuple(out.shape))


if __name__ == "__main__":
    main()
