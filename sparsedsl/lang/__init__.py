"""The language: index, mask and score expressions on sympy, tables, and attention patterns. Loads sympy, not torch."""
