"""What older versions of torch have not, and newer ones do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

BEFORE_2_13 = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


@contextlib.contextmanager
def of_two_dtypes() -> Iterator[None]:
    """Around a library's own loss, never around ours: torch's mse_loss of two dtypes has a backward from 2.13 on."""
    try:
        yield
    except RuntimeError as error:
        if not BEFORE_2_13 or "Found dtype" not in str(error):
            raise
        pytest.skip("torch's mse_loss has no backward of two dtypes before 2.13")
