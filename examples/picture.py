"""What does my pattern look like, at 96 tokens and at a million?

Writes two pictures; the long one is drawn from the tile analysis and a sample, never from all pairs.

    python examples/picture.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

import sparsedsl as sd


def main() -> None:
    """Write the pictures to the folder given, default out/."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    folder.mkdir(parents=True, exist_ok=True)
    for length, pattern in (
        (96, sd.patterns.streaming_llm(window=24, sink_count=4)),
        (2**20, sd.patterns.streaming_llm(window=65_536, sink_count=4096)),
    ):
        path = folder / f"streaming_llm_{length}.png"
        sd.plot(pattern, length).savefig(path)
        print(path)


if __name__ == "__main__":
    main()
