PYTHON ?= python3
NAME ?= wikipedia-mini
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install pretrain pretrain-images table-labels test test-slow test-chaos check lint types format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## install everything from requirements.lock into .venv

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rayssl needs Python 3.11 or newer: make PYTHON=...")'
	@echo "installing into $(VENV), some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

pretrain: $(INSTALLED) ## the main job: sample text to a registered encoder (NAME=... for another run)
	@$(RUN)/rayssl samples wikipedia
	@$(RUN)/rayssl pretrain text-mini --data samples/wikipedia --name $(NAME)
	@$(RUN)/rayssl verify $(NAME)
	@echo '$$ rayssl fill-mask models:/rayssl-text@candidate "The capital of the country is the [MASK] of its government."'
	@$(RUN)/rayssl fill-mask models:/rayssl-text@candidate "The capital of the country is the [MASK] of its government."
	@echo "look around: $(RUN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

MNIST := samples/mnist/mnist

pretrain-images: $(INSTALLED) ## two encoders of MNIST, and how well labels are told from their features
	@$(RUN)/rayssl samples mnist
	@$(RUN)/rayssl pretrain mnist-triplet --data '$(MNIST)-train-*.tar' --name mnist-triplet
	@$(RUN)/rayssl pretrain mnist-autoencoder --data '$(MNIST)-train-*.tar' --name mnist-autoencoder
	@$(RUN)/rayssl evaluate mnist-triplet --data '$(MNIST)-train-*.tar' --test '$(MNIST)-test-*.tar' --labels cls
	@$(RUN)/rayssl evaluate mnist-autoencoder --data '$(MNIST)-train-*.tar' --test '$(MNIST)-test-*.tar' --labels cls

GROUPS := samples/newsgroups/newsgroups
FASHION := samples/fashion/fashion

table-labels: $(INSTALLED) ## what pretraining is worth where labels are few: most of an hour, needs apt-get
	@$(RUN)/rayssl samples newsgroups
	@$(RUN)/rayssl samples fashion
	@$(RUN)/rayssl pretrain newsgroups-mini --data '$(GROUPS)-train-*.jsonl' --name newsgroups-mini
	@$(RUN)/rayssl pretrain fashion-triplet --data '$(FASHION)-train-*.tar' --name fashion-triplet
	@$(RUN)/python -m infra.bench.labels newsgroups runs/newsgroups-mini '$(GROUPS)-train-*.jsonl' \
		--test '$(GROUPS)-test-*.jsonl' --labels label --most 5000 --training.epochs 3 \
		--training.least-steps 200 --training.slots 1 --training.evaluations 8
	@$(RUN)/python -m infra.bench.labels fashion runs/fashion-triplet '$(FASHION)-train-*.tar' \
		--test '$(FASHION)-test-*.tar' --labels cls --most 10000 --training.epochs 5 \
		--training.slots 1 --training.evaluations 10

test: $(INSTALLED) ## lint, types and the tests
	@$(MAKE) --no-print-directory check
	@$(RUN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED) ## the tests that take minutes
	@$(RUN)/python -m pytest -m "slow and not chaos"

test-chaos: $(INSTALLED) ## more kills and outages, minutes each
	@$(RUN)/python -m pytest -m chaos

check: lint types ## lint and types

lint: $(INSTALLED)
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check --quiet .

types: $(INSTALLED)
	@$(RUN)/mypy

format: $(INSTALLED) ## format the code
	@$(RUN)/ruff check --fix --quiet .
	@$(RUN)/ruff format --quiet .

lock: $(INSTALLED) ## write requirements.lock from what is installed
	@$(RUN)/python -m pip freeze --all --exclude pip --exclude rayssl | sed 's/+cpu$$//' > requirements.lock

clean: ## remove what install and the tests made; runs and models stay
	@rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
