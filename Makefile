PYTHON ?= python3
BIN := .venv/bin
OLDEST := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]$$/\1/p' pyproject.toml)

# Thousands of cases, a million updates and whole runs, which tracing slows and which cover nothing
# more.
UNTRACED := tests/test_optim_db.py tests/test_life.py tests/test_long_life.py
UNTRACED += tests/test_notebooks.py tests/test_third_party.py tests/test_interrupts.py

.PHONY: bench demo docs notebooks random-labels test soak test-clients test-optimizers test-oldest
.PHONY: test-newest clean

demo: .venv/ready
	$(BIN)/python examples/digits.py --picture examples/digits.png

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy averaging_optim tests examples notebooks benchmarks docs/conf.py
	$(BIN)/pytest --cov $(UNTRACED:%=--ignore %)
	$(BIN)/pytest $(UNTRACED)

# The site, in docs/_build/html.
docs: .venv/ready
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

# Every number and picture of the notebooks anew.
notebooks: .venv/ready
	$(BIN)/python notebooks/execute.py

# The large experiment that the second notebook quotes: up to an hour of one core.
random-labels: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python examples/random_labels.py > examples/random_labels.txt

bench: .venv/ready
	$(BIN)/python benchmarks/cpu.py --largest 1e9
	$(BIN)/python benchmarks/rounding.py

# Random lives by the thousand: half an hour and more.
soak: .venv/ready
	$(BIN)/pytest --hypothesis-profile soak tests/test_life.py

# Every optimizer of eleven packages, of which `test` takes twenty, and a table of the results.
test-optimizers: .venv-optimizers/ready
	.venv-optimizers/bin/pytest --quiet -rN tests/test_third_party.py --all-optimizers

# Eighteen libraries that train, each driven as its users do, with a plain optimizer and a wrapped one.
test-clients: .venv-clients/ready
	OMP_NUM_THREADS=1 .venv-clients/bin/pytest tests/clients

# The oldest torch that is declared and the newest there is, with whatever versions pip takes.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/pytest

test-newest: .venv-newest/ready
	.venv-newest/bin/pytest

# timm needs torchvision, but the one file of it that averages does not.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench,demo,docs,notebooks,test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

.venv-optimizers/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-optimizers
	.venv-optimizers/bin/pip install --quiet --constraint constraints.txt --editable '.[optimizers,test]'
	.venv-optimizers/bin/pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

# fastai needs torchvision and spaCy, but not for tables.
.venv-clients/ready: pyproject.toml constraints.txt constraints-clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --constraint constraints.txt \
		--constraint constraints-clients.txt --editable '.[clients,test]'
	.venv-clients/bin/pip install --quiet --no-deps --constraint constraints-clients.txt fastai
	touch $@

.venv-oldest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --editable '.[demo,notebooks,test]' torch==$(OLDEST)
	.venv-oldest/bin/pip install --quiet --no-deps timm
	touch $@

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[demo,notebooks,test]'
	.venv-newest/bin/pip install --quiet --no-deps timm
	touch $@

clean:
	rm -rf .venv* .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build
