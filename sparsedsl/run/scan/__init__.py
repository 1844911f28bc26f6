"""Recurrent sources, chunkwise parallel: decayed linear attention and gated slots."""
