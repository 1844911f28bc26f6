"""Choices made at a call: scores that come in pieces, rules that turn them into lists; never rows x blocks at once."""
