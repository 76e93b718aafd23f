"""Triton device code: imports triton and nothing else of this package."""
