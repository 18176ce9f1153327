# The commands of a developer and of a first visitor. `make demo` installs what raymoe itself needs;
# the others need `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
STAMP := $(VENV)/.installed
TOOLS := .tools
CHECKS := $(TOOLS)/checks
BUILDER ?= docker
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
IMAGE ?= raymoe:$(VERSION)
VARIANT ?= cpu
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo lint format quick test coverage soak docs chart chart-test image image-test protos clean

setup: $(STAMP)

# Any change of the pinned set rebuilds what is installed; torch goes first and alone, since every
# other package that needs torch would otherwise pull a build of its own.
$(BASE): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	touch $@

$(STAMP): $(BASE)
	$(INSTALL) --editable '.[test,lint]'
	touch $@

demo: $(BASE)
	$(BIN)/python -m jobs.tools.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One process runs all tests that start Ray; the others are dealt out. A process that a hung test ends is not
# replaced, since the scheduler then waits for ever.
PARALLEL := -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

# What takes no more than a second or two of tests/unit, for the everyday loop.
quick: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not soak" tests/unit

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not soak and not chart"

# Lines and branches of all packages, under the tests that need no Ray, and in the processes that they start.
coverage: setup
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term -m "not soak and not chart" \
	    --ignore tests/integration

# All of it, or one of four parts of about the same length: make soak QUARTER=1.
soak: setup
	$(BIN)/python -m pytest -m soak --timeout 3600 -rP $(if $(QUARTER),--soak-part $(QUARTER)/4)

# The list of modules in docs/modules.md.
docs: setup
	$(BIN)/python -m docs.modules

# What the chart's values.yaml says, in its schema and in docs/kubernetes.md.
chart: setup
	$(BIN)/python -m helm.generate

# helm, and what judges its output, in environments of their own.
chart-test: setup $(CHECKS)/.installed
	$(BIN)/python -m helm.tools $(TOOLS)
	$(BIN)/python -m pytest -n 2 tests/chart --timeout 900

$(CHECKS)/.installed: helm/checks.txt
	test -x $(CHECKS)/bin/python || $(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/python -m pip install --quiet --disable-pip-version-check -r helm/checks.txt
	touch $@

# BUILDER is docker, podman or buildah; IMAGE_BASE, TORCH_INDEX and PIP_ARGS go to the Dockerfile if they are given.
image:
	$(BUILDER) build --build-arg VARIANT=$(VARIANT) \
	    $(if $(IMAGE_BASE),--build-arg BASE="$(IMAGE_BASE)") \
	    $(if $(TORCH_INDEX),--build-arg TORCH_INDEX="$(TORCH_INDEX)") \
	    $(if $(PIP_ARGS),--build-arg PIP_ARGS="$(PIP_ARGS)") \
	    $(IMAGE_ARGS) --tag $(IMAGE) .

# The image, built on a base by debootstrap, in read-only containers that train and serve; needs root, debootstrap,
# buildah, podman and runc. IMAGE_BASE, SUITE, MIRROR and PODMAN say otherwise what it takes.
image-test: setup
	$(BIN)/python tests/image/check.py --work $(TOOLS)/image \
	    $(if $(IMAGE_BASE),--base "$(IMAGE_BASE)") $(if $(SUITE),--suite "$(SUITE)") \
	    $(if $(MIRROR),--mirror "$(MIRROR)") $(if $(PODMAN),--podman "$(PODMAN)")

protos: setup
	$(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) build *.egg-info runs
