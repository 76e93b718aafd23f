import os
from importlib.util import find_spec

import pytest
import torch

GPU = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it must be set before the first import of one (or of triton, which
# torch imports when it pleases). The interpreter lets the kernels run in every test on a CPU.
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torchvision, which open_clip and lightly import, declares fake kernels for operators of its own shared library. Beside
# a torch that this was not built for (a CPU's, where PyPI's torchvision is CUDA's) it does not load, and the import
# raises "operator torchvision::nms does not exist". The losses need none of them: their schemas are enough.
if find_spec("torchvision") is not None:
    try:
        import torchvision as _  # noqa: F401
    except RuntimeError:
        TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # its schemas live as long as this does
        for operator in ("nms", "qnms"):
            TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty gives NaN, so that a read before the first write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
