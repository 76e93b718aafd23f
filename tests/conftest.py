import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

GPU = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it must be set before the first import of one (or of triton, which
# torch imports when it pleases). The interpreter lets the kernels run in every test on a CPU.
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# transformers imports torchvision where it is installed. One built for CUDA does not import beside a torch without it:
# its operators do not load, and it registers them by name. No test calls them: names are enough.
if importlib.util.find_spec("torchvision"):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        torchvision_names = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            torchvision_names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


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


@pytest.fixture(scope="session")
def host_extension(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`fusedloss._C`, compiled for a CPU."""
    spec = importlib.util.spec_from_file_location("host_build", Path(__file__).parent / "host" / "build.py")
    assert spec is not None and spec.loader is not None
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    if why := host.why_not():
        pytest.skip(why)
    cache = getattr(pytestconfig, "cache", None)
    folder = tmp_path_factory.getbasetemp() if cache is None else Path(cache.mkdir("host"))
    return host.load(host.build(folder, sanitize="FUSEDLOSS_HOST_SANITIZE" in os.environ))


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


@pytest.fixture(autouse=True)
def cuda_kernels_on_a_cpu(request, monkeypatch):
    """Without a GPU, backend "cuda" in a test's parameters is csrc/ on a CPU."""
    callspec = getattr(request.node, "callspec", None)
    named = callspec and [value for name, value in callspec.params.items() if name != "device" and value == "cuda"]
    if GPU or not named:
        return
    from fusedloss.backends import cuda, cuda_rows

    extension = request.getfixturevalue("host_extension")
    for module in (cuda, cuda_rows):
        monkeypatch.setattr(module, "extension", lambda: extension)
