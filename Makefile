PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/ready
	$(BIN)/python examples/digits.py --picture examples/digits.png

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy averaging_optim tests examples
	$(BIN)/pytest --cov --ignore tests/test_optim_db.py
	$(BIN)/pytest tests/test_optim_db.py # thousands of cases, which cover nothing that others do not

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

clean:
	rm -rf .venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
