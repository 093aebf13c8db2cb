PYTHON ?= python3
BIN := .venv/bin
OLDEST := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]$$/\1/p' pyproject.toml)

# Thousands of cases, a million updates and whole runs, which tracing slows and which cover nothing
# more.
UNTRACED := tests/test_optim_db.py tests/test_life.py tests/test_long_life.py
UNTRACED += tests/test_notebooks.py tests/test_third_party.py tests/test_interrupts.py
UNTRACED += tests/test_language_model.py tests/test_migration.py tests/test_no_sync.py

# What reads files of the repository or starts Python, so that a file left out of what is uploaded is
# missed. The other tests see the same modules as `make test` does.
PACKAGED := tests/test_docs.py tests/test_migration.py tests/test_package.py tests/test_release.py
PACKAGED += tests/test_released_checkpoints.py tests/test_typing.py tests/test_merging.py
PACKAGED += tests/test_killed.py tests/test_parallel.py

CHECK_SCHEMA := .venv-package/bin/check-jsonschema --builtin-schema

.PHONY: bench demo docs language-model notebooks random-labels test soak test-clients test-optimizers test-oldest
.PHONY: test-newest package release clean

demo: .venv/demo
	@echo "Running examples/digits.py: a minute if a core is idle, several if all are busy."
	$(BIN)/python examples/digits.py --picture examples/digits.png

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy averaging_optim tests examples notebooks benchmarks docs/conf.py release.py
	$(BIN)/pytest --cov $(UNTRACED:%=--ignore %)
	$(BIN)/pytest $(UNTRACED)

# The site, in docs/_build/html.
docs: .venv/ready
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

# Makes every number and picture of the notebooks again.
notebooks: .venv/ready
	$(BIN)/python notebooks/execute.py

# The large experiment that the second notebook quotes: up to an hour of one core.
random-labels: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python examples/random_labels.py > examples/random_labels.txt

# The runs of examples/language_plan.py that have no result yet, then tables and pictures of all.
language-model: .venv/demo
	$(BIN)/python examples/language_model.py all
	$(BIN)/python examples/language_model.py report

bench: .venv/ready
	$(BIN)/python benchmarks/cpu.py --largest 1e9
	$(BIN)/python benchmarks/rounding.py

# Random lives by the thousand: half an hour and more.
soak: .venv/ready
	$(BIN)/pytest --hypothesis-profile soak tests/test_life.py

# Every optimizer of eleven packages, of which `test` takes twenty, and a table of the results.
test-optimizers: .venv-optimizers/ready
	.venv-optimizers/bin/pytest --quiet -rN tests/test_third_party.py --all-optimizers

# Nineteen libraries that train, each driven as its users do, with a plain optimizer and a wrapped one.
test-clients: .venv-clients/ready
	OMP_NUM_THREADS=1 .venv-clients/bin/pytest tests/clients

# The oldest torch that is declared and the newest there is, with whatever versions pip takes.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/pytest

test-newest: .venv-newest/ready
	.venv-newest/bin/pytest

# Builds what is uploaded, checks it, and runs tests of the unpacked sdist with the installed wheel.
package: .venv-package/ready
	rm -rf dist .venv-wheel
	.venv-package/bin/python -m build
	.venv-package/bin/twine check --strict dist/*
	.venv-package/bin/check-wheel-contents dist/*.whl
	$(CHECK_SCHEMA) vendor.citation-file-format CITATION.cff
	$(CHECK_SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(CHECK_SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK_SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet --constraint constraints.txt \
		"$$(echo dist/*.whl)[demo,notebooks,test]"
	.venv-wheel/bin/pip install --quiet --constraint constraints.txt --no-deps timm
	mkdir .venv-wheel/sdist
	tar --extract --gzip --file dist/*.tar.gz --directory .venv-wheel/sdist --strip-components 1
	rm -r .venv-wheel/sdist/averaging_optim # or Python would find it before the installed one
	cd .venv-wheel/sdist && ../bin/pytest --pyargs averaging_optim $(PACKAGED)

# Sets the version, commits, checks what is committed, and tags it. Pushes and uploads nothing.
release: .venv/ready
	$(BIN)/python release.py $(VERSION)
	$(BIN)/python tests/write_checkpoints.py tests/data/$(VERSION)
	git add tests/data/$(VERSION)
	git commit --quiet --all --message "Release $(VERSION)"
	$(MAKE) test docs package
	git tag --annotate v$(VERSION) --message "averaging_optim $(VERSION)"
	@echo "v$(VERSION) is tagged and in dist. Look at it, then publish it:"
	@echo "    git push --follow-tags && .venv-package/bin/twine upload dist/*"

.venv/demo: pyproject.toml constraints.txt
	@echo "Installing torch and what the demo needs into .venv: one to five minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --progress-bar on --constraint constraints.txt --editable '.[demo]'
	touch $@

# timm needs torchvision, but the one file of it that averages does not.
.venv/ready: .venv/demo
	@echo "Installing what tests, pages and notebooks need into .venv: three to ten minutes, once."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench,demo,docs,notebooks,test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

.venv-package/ready: constraints.txt
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --quiet --constraint constraints.txt \
		build check-jsonschema check-wheel-contents twine
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
	rm -rf .venv* .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build dist
