# Everything starts here: `make quickstart` trains a small model, `make test` runs every check.
# Needs Python 3.11 to 3.13, git and make, on Linux, a Mac with Apple silicon, or WSL; all that is
# installed goes into .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first of these that can be taken: for 3.14 there is no tensorflow-text, which seqio needs.
# Choose another with `make PYTHON=/path/to/python ...`.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3 python python3.12 python3.13; do \
	"$$p" -c '$(SUPPORTED)' >/dev/null 2>&1 && echo "$$p" && break; done)

# pip says nothing of what is there already, and one line for each package that it fetches.
PIP_INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off
ONLY_NEWS := sed -u -n -E -e 's/^Collecting /  fetching /p' -e '/^(Installing collected|Success)/p' \
	-e '/^(ERROR|WARNING)/p'

.PHONY: help quickstart study bert digits tones tpu test check peers docs lint types format clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

quickstart: .venv/.runtime  ## train a small model on an embedded text and show what it learned
	.venv/bin/python scripts/quickstart.py

study: .venv/.runtime  ## a small study of minutes, to its report: 2 attentions, 2 seeds
	.venv/bin/python scripts/prepare_data.py --source=bible --output=stores/bible --vocab_size=4096
	.venv/bin/python scripts/study.py --study=configs/studies/demonstration.py \
		--output=studies/demonstration

bert: .venv/.runtime  ## a BERT that learns masked words of the embedded corpus
	.venv/bin/python scripts/prepare_data.py --source=bible --output=stores/bible --vocab_size=4096
	.venv/bin/python train.py --config=configs/bert.py:size=tiny,attention=laser --workdir=runs/bert

digits: .venv/.images  ## a vision transformer that learns handwritten digits
	.venv/bin/python train.py --config=configs/vit.py:size=digits,attention=laser \
		--workdir=runs/digits

tones: .venv/.runtime  ## a Conformer that learns to spell made-up words of tones
	test -d stores/tones || .venv/bin/python scripts/prepare_speech.py --train=tones:1000 \
		--validation=tones:100@1 --vocab_size=12 --output=stores/tones
	.venv/bin/python train.py --config=configs/tones.py:attention=laser --workdir=runs/tones

# More lists by WITH="wandb images".
tpu: .venv/.tpu $(WITH:%=.venv/.%)  ## install what training on this TPU VM needs

# Twice the cores, as tests also wait, for other processes above all. A worker has up to 4 GB in
# memory: with less, as `make WORKERS=2 test`.
WORKERS ?= $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN))))
PYTEST := .venv/bin/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal

test: lint types  ## ruff, mypy and every test, the slow ones too
	$(PYTEST)

check: lint types  ## ruff, mypy and the quick tests
	$(PYTEST) -m "not slow"

PEERS := dropins export models/test_bert.py models/test_vit.py scripts/test_benchmark_torch.py
peers: .venv/.peers  ## compare models and layers with those of PyTorch and transformers
	$(PYTEST) $(PEERS:%=tests/%)

docs: .venv/.docs  ## build the documentation into site/html; a dead link is an error
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs site/html
	@echo "Open site/html/index.html"

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev
	.venv/bin/mypy

format: .venv/.dev  ## format the code and mend what ruff can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## remove .venv, site/ and caches; runs/ and stores/ stay
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUPPORTED)'; then \
		echo "Python 3.11, 3.12 or 3.13 is needed, on Linux, a Mac with Apple silicon, or WSL." \
			"Install one, or: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi
	@echo "Making .venv with $$("$(PYTHON)" --version) ($(PYTHON))"
	@"$(PYTHON)" -m venv .venv || { rm -rf .venv; \
		echo "Could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# The stamps are newer than the lists that they stand for: a second call installs nothing.
.venv/.runtime: requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt into .venv (some minutes the first time)"
	@$(PIP_INSTALL) -r requirements.txt | $(ONLY_NEWS)
	@touch $@

EXTRAS := bucket images plan speech wandb
.venv/.dev: requirements-dev.txt $(EXTRAS:%=requirements-%.txt) .venv/.runtime
	@echo "Installing requirements-dev.txt into .venv"
	@$(PIP_INSTALL) -r requirements-dev.txt | $(ONLY_NEWS)
	@touch $@

.venv/.images: requirements-images.txt .venv/.runtime
	@echo "Installing requirements-images.txt into .venv"
	@$(PIP_INSTALL) -r requirements-images.txt | $(ONLY_NEWS)
	@touch $@

.venv/.peers: requirements-peers.txt .venv/.dev
	@echo "Installing requirements-peers.txt into .venv"
	@$(PIP_INSTALL) -r requirements-peers.txt | $(ONLY_NEWS)
	@touch $@

.venv/.docs: requirements-docs.txt .venv/.runtime
	@echo "Installing requirements-docs.txt into .venv"
	@$(PIP_INSTALL) -r requirements-docs.txt | $(ONLY_NEWS)
	@touch $@

.venv/.tpu: requirements-bucket.txt
.venv/.%: requirements-%.txt .venv/.runtime
	@echo "Installing $< into .venv"
	@$(PIP_INSTALL) -r $< | $(ONLY_NEWS)
	@touch $@
