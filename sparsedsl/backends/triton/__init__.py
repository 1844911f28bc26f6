"""Launchers of generated Triton kernels and of those in ``codegen/kernels``."""
