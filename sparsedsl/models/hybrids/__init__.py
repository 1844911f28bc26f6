"""Hybrid layers that published systems consist of, for :func:`sparsedsl.models.convert`."""
