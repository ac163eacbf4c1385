# make study                          the quickstart: synthetic radiographs, two cores, about twelve minutes
# make study STUDY=real DATA=/path    every task on real radiographs (or GLORIA_DATA=/path); STUDY=nih needs NIH alone
# make study FORCE=07_zero_shot       repeat the runs whose ids begin so, and what depends on them (FORCE=all: all)
# make study TRUST_DATA=1             do not look whether the files of the data have changed since they were prepared
# make study SNAKEMAKE_ARGS="--executor slurm --jobs 40"    one cluster job for each notebook
# make study SNAKEMAKE_ARGS="--resources gpu=1" CORES=8    at most one notebook at a time that asks for a GPU
# make explore                        click a word, see the region: the quickstart's models as a web page (STUDY=...)
# make test | lint | lab              tests | style check | JupyterLab on the notebooks
# make test-browser                   the explorer in JupyterLab and Voila, driven in Debian's chromium
# make figures                        the README's pictures of the explorer, from the quickstart's models
#
# The first call makes .venv from requirements.txt; later calls do so only when requirements.txt or pyproject.toml changed.

PYTHON ?= python3
STUDY ?= quickstart
CORES ?= 2
DATA ?=
FORCE ?=
SET ?=
TRUST_DATA ?=
PROFILE ?=
SNAKEMAKE_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: study explore test test-browser figures lint lab install
.DEFAULT_GOAL := study

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

study: $(INSTALLED)
	@$(BIN)/python -m gloria_core.study run $(STUDY) --cores $(CORES) $(if $(DATA),--data '$(DATA)') \
		$(if $(FORCE),--force '$(FORCE)') $(if $(TRUST_DATA),--trust-data) $(foreach pair,$(SET),--set '$(pair)') \
		--snakemake='$(if $(PROFILE),--profile $(PROFILE)) $(SNAKEMAKE_ARGS)'

explore: $(INSTALLED)
	GLORIA_EXPLORE='$(CURDIR)/results/runs/$(STUDY)' $(BIN)/voila gloria_core/viz/explorer/explore.ipynb

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-browser: $(INSTALLED)
	GLORIA_BROWSER_TESTS=1 $(BIN)/python -m pytest -n 0 tests/browser

figures: $(INSTALLED)
	GLORIA_BROWSER_TESTS=1 GLORIA_PICTURES=results $(BIN)/python -m pytest -n 0 tests/browser -k "readme or jupyterlab or voila"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks
