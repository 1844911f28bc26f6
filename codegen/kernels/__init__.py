"""Triton kernels that do not depend on a pattern's text. Each module imports Triton: load them only where kernels run."""
