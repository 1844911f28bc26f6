"""Choosing on tensors: cheap scores, rules that turn them into index lists, and orders. Nothing here holds queries x chunks at once."""
