# Everything runs inside .venv; nothing is needed beforehand but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITES := .venv-suites
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-slow test-suites lint format docs results results-tasks bench bench-device bench-gpu soak fuzz clean

demo: $(VENV)/demo
	$(BIN)/proximo train CartPole-v1 --stop-at-return 475 --run-dir $(DEMO)
	$(BIN)/proximo evaluate $(DEMO) --episodes 100
	@echo
	@echo "everything is in $(DEMO):"
	@ls $(DEMO)

# Lint, types, import contracts, then the tests that take less than about ten seconds each.
test: lint
	$(BIN)/pytest -n auto -m "not slow" $(ARGS)

# The longer ones: learning to a stated return, commands in the documentation, faults over minutes.
test-slow: $(VENV)/dev
	$(BIN)/pytest -n auto -m slow $(ARGS)

# Environments in JAX of other packages, which need an older Gymnasium, in a virtual environment of their own.
test-suites: $(SUITES)/ok
	$(SUITES)/bin/python -m pytest tests/suites $(ARGS)

lint: $(VENV)/dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in docs/_build.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "open docs/_build/html/index.html"

# Learning results under benchmarks/results, as the README quotes them. Hours on two cores.
results: $(VENV)/dev
	$(BIN)/python benchmarks/learning.py CartPole-v1 --seeds 20 --confirm 20-39 --film
	for env in Acrobot-v1 MountainCar-v0 MountainCarContinuous-v0 Pendulum-v1 LunarLander-v3 \
			LunarLanderContinuous-v3 InvertedPendulum-v5 Reacher-v5 Swimmer-v5 Hopper-v5 HalfCheetah-v5 Walker2d-v5; do \
		$(BIN)/python benchmarks/learning.py $$env --seeds 5 --confirm 10-14 --backends jax --film || exit 1; done
	$(BIN)/python benchmarks/learning.py HalfCheetah-v4 --seeds 5 --backends jax
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/report.py --write
	$(BIN)/python benchmarks/gallery.py --write

# The same for tasks that need memory, hybrid actions, nested observations or masks. About an hour on two cores.
results-tasks: $(VENV)/dev
	$(BIN)/python benchmarks/learning_tasks.py
	$(BIN)/python benchmarks/report.py --write

# Speed, memory and time to solve beside other libraries, into benchmarks/RESULTS.md. Each of them is installed into
# .venv-peers. Takes hours on two cores; `make bench ARGS=--resume` continues, ARGS="--cases …" runs a part.
bench: $(VENV)/dev
	$(BIN)/python benchmarks/compare.py $(ARGS)
	$(BIN)/python benchmarks/results_page.py

# Environments in JAX on the device beside PureJaxRL and Brax: make bench-device PUREJAXRL=<a clone of it>. An
# interpreter for PureJaxRL has gymnax 0.0.9, flax, optax and distrax: PEER=<python>. `make bench-gpu` is the same on CUDA.
bench-device: $(VENV)/dev $(SUITES)/ok
	$(BIN)/python benchmarks/device.py --purejaxrl $(PUREJAXRL) --python $(or $(PEER),$(SUITES)/bin/python) $(ARGS)
	$(SUITES)/bin/python benchmarks/brax_ppo.py

bench-gpu: ARGS = --device cuda --scale 20
bench-gpu: bench-device

# Kill and resume a run for 20 minutes and compare it with an uninterrupted run; ARGS="--minutes 5" for less.
soak: $(VENV)/dev
	$(BIN)/python tests/soak.py $(ARGS)

# Fuzz the file loaders with 100 times as many examples as `make test`.
fuzz: $(VENV)/dev
	PROXIMO_FUZZ=15000 $(BIN)/pytest -q tests/run/test_reliability.py -k "any_"

clean:
	rm -rf $(VENV) $(SUITES) .venv-peers build dist docs/_build src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/docs: pyproject.toml constraints.txt | $(VENV)/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(SUITES)/ok: pyproject.toml constraints.txt | $(VENV)/pip
	$(PYTHON) -m venv $(SUITES)
	grep -v '^gymnasium==' constraints.txt > $(SUITES)/constraints.txt
	$(SUITES)/bin/python -m pip install --quiet --constraint $(SUITES)/constraints.txt pytest pytest-xdist \
		--editable ".[gymnax,brax,playground,navix,craftax,jumanji]"
	@touch $@
