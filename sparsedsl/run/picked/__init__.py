"""Attention over chunks that were picked for each query: index lists in, ``(out, lse)`` out."""
