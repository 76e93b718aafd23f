import contextlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import interpreter
import pytest
import torch
from grids import cover

GPU = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it must be set before the first import of one (or of triton, which
# torch imports when it pleases). The interpreter lets the kernels run in every test on a CPU.
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    interpreter.replace_once()

# In CI the same examples each time, and nowhere a limit on time: a test fails for what it computes.
with contextlib.suppress(ImportError):  # a machine with a GPU may have none; test files that need it say so
    import hypothesis

    options = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    if os.environ.get("CI"):
        options |= {"derandomize": True, "database": None}
    hypothesis.settings.register_profile("suite", **options)
    hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what a test's parameters say of it; `make quick` and its neighbours choose by the marks."""
    products: dict[str, list[pytest.Function]] = {}
    for item in items:
        for name in kinds(item):
            item.add_marker(name)
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))
        if item.get_closest_marker("pairwise") and not item.get_closest_marker("whole"):
            assert isinstance(item, pytest.Function)
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for product in products.values():
        # By identity: parameters need not be hashable, nor comparable.
        cases = [tuple(map(id, item.callspec.params.values())) for item in product]
        short = [place for place, item in enumerate(product) if not item.get_closest_marker("grid")]
        pairs = {short[place] for place in cover([cases[place] for place in short])}
        triples = cover(cases, 3, beside=pairs)
        for place, item in enumerate(product):
            if place not in pairs:
                item.add_marker("grid" if place in triples else "whole")


def kinds(item: pytest.Item) -> set[str]:
    """On a CPU, backend "triton" is Triton's interpreter and "cuda" the host's build of csrc/."""
    if GPU:
        return set()
    callspec = getattr(item, "callspec", None)
    values = [value for name, value in callspec.params.items() if name != "device"] if callspec else []
    backends = {value for value in values if isinstance(value, str)}
    fixtures = getattr(item, "fixturenames", ())
    found = {"interpreter"} if "triton" in backends else set()
    return found | ({"host"} if "cuda" in backends or "host_extension" in fixtures else set())


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def host_extension() -> ModuleType:
    """`fusedloss._C`, compiled for a CPU: once, by whichever process is first."""
    spec = importlib.util.spec_from_file_location("host_build", Path(__file__).parent / "host" / "build.py")
    assert spec is not None and spec.loader is not None
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    if why := host.why_not():
        pytest.skip(why)
    return host.load(host.build(sanitize="FUSEDLOSS_HOST_SANITIZE" in os.environ))


@pytest.fixture(scope="session", autouse=True)
def cache_of_verdicts(tmp_path_factory) -> None:
    """Empty, and not the user's; processes that tests start have it, too."""
    os.environ["FUSEDLOSS_CACHE_DIR"] = str(tmp_path_factory.mktemp("verdicts"))


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
    from fusedloss.backends.cuda import launching

    extension = request.getfixturevalue("host_extension")
    monkeypatch.setattr(launching, "extension", lambda: extension)
