# Two commands for a fresh machine with Python and pip; both make their own virtual environment first.
#   make demo    the main job on real images: train, sample, evaluate, report (minutes on two cores)
#   make test    the tests
# and one that needs no training: make study-report, the figures and tables of the project's own study
# And the documentation: make docs, into docs/_build/html.

VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test tests slow lint docs links study-report

demo: $(VENV)/core
	$(VENV)/bin/harness run --backbone dit-2xs-2 --set objective=sit

study-report: $(VENV)/core # the project's own study, from its kept measurements
	$(VENV)/bin/python studies/findings.py --check
	$(VENV)/bin/harness report --protocol fashion-mnist-16 --out runs/study-report

test: lint tests

tests: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --allowed-skips tests/allowed-skips.txt

slow: $(VENV)/dev
	$(VENV)/bin/python -m pytest --slow -m slow

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --cache-dir $(VENV)/mypy

docs: $(VENV)/dev
	$(VENV)/bin/python -m sphinx -E -a -W --keep-going -n -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

links: $(VENV)/dev # follows the external links, so it needs a network
	$(VENV)/bin/python -m sphinx -q -b linkcheck docs docs/_build/links

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV): a minute or two, most of it torch"
	$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) with everything the tests need: a minute or two, most of it torch"
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/core
