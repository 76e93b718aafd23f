# Every target but those named gpu works in .venv, which it makes itself; what it installs is pinned by constraints.txt.
# Another torch or Python has an environment of its own.
PYTHON ?= python3
EXTRAS ?= dev
VENV := .venv$(if $(TORCH),-torch-$(TORCH))$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
GPU := PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/gpu" $(PYTHON)
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready-$(EXTRAS)
SITE := $(VENV)/.ready-docs

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-all test-whole fuzz test-upstream versions lint docs wheel gpu gpu-build gpu-tune gpu-full gpu-sanitize has-sanitizer clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo 'PYTHON=python3.14 names the interpreter: of an environment of its own, or of gpu and gpu-full.'
	@echo 'TORCH=2.15.0 takes that torch and its Triton, in an environment of its own: make test TORCH=2.15.0. On Linux'
	@echo '  PyPI has builds for CUDA, which need 5 GB of disk and run on a CPU as well; with PIP_EXTRA_INDEX_URL=https://'
	@echo '  download.pytorch.org/whl/cpu it is one for a CPU. EXTRAS=test leaves out the libraries that tests compare with.'

demo: $(INSTALLED) ## search code by meaning: train a small encoder on a CPU
	$(BIN)/python examples/code_search.py

# A process for each core, of one thread: most tensors here are too small to share, and a second thread's start costs
# more than it brings. The tests of four thousand rows and more are the exception. Each process has files from first to
# last while it can, so that what a file builds, compiles or starts for its tests is not made in both.
# pyproject.toml lists the markers, tests/conftest.py sets most of them.
FOR := tests
# Bytecode is kept, whatever the environment says: pytest would rewrite all test files once more in each process, and
# every process that a test starts would compile the package.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(FOR) -m
SLOW_KINDS := interpreter or host or lengthy or processes or memory or upstream or grid or whole or slow

quick: $(READY) ## after each change: the torch code, and a small run of each kernel; make quick FOR=tests/losses/test_lists.py
	$(PYTEST) 'smoke or not (gpu or $(SLOW_KINDS))'

# KIND is a marker or an expression of them: CI runs `make test` in parts.
test: $(READY) ## before a push: whatever guards a user, of products a part with every pair; FOR= as in quick; KIND=host
	$(PYTEST) '$(if $(KIND),($(KIND)) and )not (gpu or grid or whole or slow)'

test-all: $(READY) ## what `make test` leaves: products with every triple, what nvcc and Triton's compiler make, slow ones
	$(PYTEST) '(grid or slow) and not (gpu or whole)'

test-whole: $(READY) ## what `make test-all` leaves: the rest of whole products
	$(PYTEST) 'whole and not gpu'

# `make test` runs a fixed minute of it. SEED is the first case's number; tests/fuzz/__init__.py says how to replay one.
SECONDS := 3600
SEED := 0
fuzz: $(READY) ## random calls of every loss against formulas in fp64, an hour: make fuzz SECONDS=600 SEED=1000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

test-upstream: $(READY) ## a library's own loss tests without and with patch(): make test-upstream CHECKOUT=../lightly
	@test -d '$(CHECKOUT)' || { echo "CHECKOUT='$(CHECKOUT)' is no folder: give a clone of the library's repository"; exit 2; }
	$(BIN)/python tools/upstream.py '$(CHECKOUT)'

RUN := $(VENV)/run.xml
versions: $(READY) ## `make test` under TORCH= and PYTHON=, and its outcome as a row of docs/versions.md
	@rm -f $(RUN)
	-PYTEST_ADDOPTS='--junitxml=$(CURDIR)/$(RUN)' $(MAKE) test
	$(BIN)/python tools/versions.py $(RUN)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(SITE) ## the site of docs/, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tools/check_site.py build/site

# Installs nothing, and compiles csrc/ for the GPUs that are here: machines with a GPU often have a torch of their own
# and no network. The package is laid out in build/gpu as a wheel would hold it, so that fusedloss.kernels and _C are
# found. PYTHONSAFEPATH keeps Python from looking in the current folder first, where there is a fusedloss without either.
gpu-build:
	rm -rf build/gpu
	$(PYTHON) setup.py --quiet build --build-lib build/gpu

# The races set FUSEDLOSS_BACKEND=triton, so that `fusedloss` runs Triton's kernels whether they are proved or not. `cuda`
# is raced explicitly, by name; losses without a sweep have only Triton's kernels.
RACES := FUSEDLOSS_BACKEND=triton $(GPU)

gpu: gpu-build ## the kernels' proofs, the GPU tests and a race, with $(PYTHON), its torch and nvcc; installs nothing
	$(GPU) -c "import torch; assert torch.cuda.is_available(), f'torch {torch.__version__} sees no GPU here'"
	-$(GPU) -m fusedloss verify
	$(GPU) -m pytest -m gpu
	$(GPU) -m fusedloss check
	$(GPU) benchmarks/overhead.py --out benchmarks/results/gpu-overhead.json
	$(RACES) benchmarks/rowwise.py --device cuda --out benchmarks/results/gpu-rowwise.json
	$(RACES) benchmarks/race.py short --device cuda --out benchmarks/results --name gpu

gpu-tune: gpu-build ## every tile of Triton's similarity kernels, every plan of cuda's: 6 minutes; fills backends/triton/measured.json
	$(GPU) benchmarks/tune.py --out benchmarks/results/gpu-tune.json --write
	$(GPU) benchmarks/tune.py --backend cuda --seconds 120 --out benchmarks/results/gpu-tune-cuda.json

gpu-full: gpu-build ## the race at every point, hours; goes on where the last one ended; fills fusedloss/trust/fastest.json
	$(RACES) benchmarks/race.py full --device cuda --out benchmarks/results --name gpu-full
	$(GPU) benchmarks/fastest.py benchmarks/results/gpu-full.json

# memcheck and initcheck know torch's tensors one by one only where nothing keeps their memory. initcheck has to see
# every kernel that writes; the others are slow, and look at this package's alone.
SANITIZER := PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/gpu" compute-sanitizer --error-exitcode 1
OURS := --kernel-name kns=fusedloss

gpu-sanitize: has-sanitizer gpu-build ## the CUDA kernels at small shapes under compute-sanitizer, with $(PYTHON): memory, races, barriers
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck $(OURS) $(PYTHON) tools/sanitize.py
	$(SANITIZER) --tool racecheck $(OURS) $(PYTHON) tools/sanitize.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool initcheck $(PYTHON) tools/sanitize.py
	$(SANITIZER) --tool synccheck $(OURS) $(PYTHON) tools/sanitize.py

has-sanitizer:
	@command -v compute-sanitizer > /dev/null || { echo 'compute-sanitizer is not on the PATH: the CUDA toolkit has it'; exit 2; }

# The wheel is made from the sdist, and its tests are the sdist's, beside neither fusedloss/ nor kernels/ of a checkout.
AWAY := build/away
wheel: $(READY) ## sdist and wheel in dist/, and the wheel's tests away from the checkout, with $(PYTHON) and its torch
	rm -rf dist $(AWAY)
	$(BIN)/python -m build --no-isolation
	$(BIN)/pip install --quiet --no-index --no-deps --target $(AWAY)/site dist/fusedloss-*.whl
	tar -xf dist/fusedloss-*.tar.gz -C $(AWAY) --strip-components 1 --wildcards '*/tests' '*/tools' '*/pyproject.toml'
	cd $(AWAY) && PYTHONPATH="$$PWD/site" PYTHONSAFEPATH=1 '$(abspath $(BIN))/python' site/bin/fusedloss info
	cd $(AWAY) && PYTHONPATH="$$PWD/site" PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 '$(abspath $(BIN))/python' -m pytest -q -n auto \
	  tests/losses tests/sweep -m 'not (gpu or $(SLOW_KINDS))'

clean: ## remove what the other targets made
	rm -rf .venv .venv-* build dist *.egg-info fusedloss/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An editable install maps kernels/ to fusedloss.kernels. Without build isolation, so that the pins hold for the
# build as well. csrc/ is compiled where there is a GPU alone (setup.py).
# Of torchvision PyPI alone may be at hand, whose build for CUDA does not import beside a torch for a CPU: the last line
# but one mends that where it is so.
BESIDE := tools/torchvision_beside_cpu_torch.py
PINS := $(VENV)/constraints.txt
PIP := $(BIN)/pip install -c $(PINS)

# Triton 3.6, of torch 2.10 and 2.11, has an interpreter that numpy 2.4 breaks.
OLD := $(filter 2.10.% 2.11.%,$(TORCH))
REPINNED := torch|torchvision|triton$(if $(OLD),|numpy)

# What the demo needs is a small part of what the tests do.
$(INSTALLED): WITH := bench
$(READY): WITH := $(EXTRAS)
$(SITE): WITH := docs
$(INSTALLED) $(READY) $(SITE): pyproject.toml setup.py constraints.txt $(BESIDE) $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	grep -Ev '$(if $(TORCH),^($(REPINNED))==,^$$)' constraints.txt > $(PINS)
	$(if $(TORCH),printf '%s\n' 'torch==$(TORCH)' $(if $(OLD),'numpy<2.4') >> $(PINS))
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation -e '.[$(WITH)]'
	$(BIN)/python $(BESIDE)
	@touch $(INSTALLED) $@
