# Everything a newcomer needs: `make demo` shows the whole chain, `make test` checks all there is.
PYTHON ?= python3
BIN := .venv/bin
STAGE := infra/stage.sh
# As many as the smallest machine has cores: what a test starts keeps them busy.
WORKERS ?= 2
TESTS := $(BIN)/python -m pytest --numprocesses $(WORKERS)
# The tests and the demo start hundreds of Pythons, which are to find the product compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-full test check soak venv lint types headers pictures browser benchmarks clean

# The whole chain on real pictures, as Ray jobs on this machine; goes on where it was.
demo: venv pictures
	$(BIN)/python jobs/demo.py

# The same with longer runs, whose results are clearer: about 14 minutes on two cores.
demo-full: venv pictures
	$(BIN)/python jobs/demo.py --full

# Environment, lint, types and every test.
test: lint types pictures browser
	@$(STAGE) tests "$(TESTS)"

# What an edit is checked by: lint, types and the tests that take no more than a moment each.
check: lint types
	@$(STAGE) "fast tests" "$(TESTS) -m 'not slow'"

# The long versions: more kills, restarts and damaged inputs; then faults planted in the product, which tests must catch.
soak: venv pictures browser
	@$(STAGE) "long tests" "VITSCALE_SOAK=1 $(TESTS) -m soak --durations=0"
	@$(STAGE) "planted faults" "$(BIN)/python tests/faults_planted/run.py"

venv: .venv/installed

# Tests compare with timm; without what it asks for, as torchvision does not load beside every torch. What pip and
# setuptools warn of is in the log, and shown where something has failed.
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
.venv/installed: pyproject.toml constraints.txt shards/area.c pipeline/data/crop.c | headers
	@echo "Installing torch, Ray, DeepSpeed, MLflow and what they need into .venv, which takes some minutes"
	@$(STAGE) environment "$(PYTHON) -m venv .venv && { $(BIN)/python -m pip install --quiet --upgrade pip && \
		$(PIP) --editable '.[demo,test]' && $(PIP) --no-deps timm; } > .venv/install.log 2>&1 || \
		{ cat .venv/install.log >&2; exit 1; }"
	@touch $@

lint: venv
	@$(STAGE) lint "$(BIN)/ruff check && $(BIN)/ruff format --check"

types: venv
	@$(STAGE) types "$(BIN)/pyright"

# libjpeg-turbo's, for the kernel that decodes no more of a picture than its crop; without them others do it, slower.
headers:
	@infra/debian.sh libjpeg-dev /usr/include/jpeglib.h

# Debian's packages, where they are to be had and may be installed; without them the pictures are downloaded, and the
# tests that open a page need another Chromium on the PATH.
pictures:
	@infra/debian.sh dataset-fashion-mnist /usr/share/datasets/fashion-mnist

browser:
	@infra/debian.sh chromium /usr/bin/chromium

# Every benchmark, short; each ends with one line of JSON.
benchmarks: venv
	for file in benchmarks/[!_]*.py; do $(BIN)/python $$file --quick || exit 1; done

# Removes what the demo has downloaded and made; the environment stays.
clean:
	rm -rf demo
