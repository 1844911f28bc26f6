"""The ``cpp`` backend: C++ generated for a pattern, compiled once, for attention on CPU."""
