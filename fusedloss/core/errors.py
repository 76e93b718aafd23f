"""Errors of the package."""

from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """No backend, or not the one asked for, can run this problem. The message lists every backend's reason."""
