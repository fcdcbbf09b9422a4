# `make demo` and `make test` set everything up on the first run, and only then.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The CPU build of torch. Without it pip would fetch several GB of CUDA libraries on Linux.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
OUTPUT_DIR ?= demo_output
BENCH_DEVICE ?= cpu
BENCH_SCALE ?= default
BENCH_THREADS ?= 2
MUTANTS ?= --minutes 60
# As many processes as the machine has cores; a file's tests share what is slow to make, so they stay together.
TEST_PROCESSES ?= auto
IN_PARALLEL = --numprocesses $(TEST_PROCESSES) --dist loadfile
# Rooms whose tests neither train for long nor start processes: some two minutes of one core altogether.
QUICK_TESTS ?= $(addprefix tests/,test_layout.py test_precision.py losses data evaluation/metrics moments attribution \
	moe testbed training/strength tuner/test_config.py tuner/test_merging.py tuner/test_strength.py tuner/test_refusals.py)

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
DOCS := $(VENV)/.docs-done
# Apart from the environment: PEFT imports these wherever it finds them, and both print warnings when imported.
QUANTIZERS := $(VENV)/quantizers
# Apart, too: gradio wants an older pillow than the pictures are drawn with.
PAGE := $(VENV)/page
BENCH = $(BIN)/python -W ignore benchmarks
BENCH_PLACE = --device $(BENCH_DEVICE) --threads $(BENCH_THREADS)
BENCH_MODEL = $(BENCH_PLACE) --scale $(BENCH_SCALE)

# Nothing here needs the network after the set-up. The models are tiny: a second thread gains nothing, and on a busy
# machine waiting for it costs twenty-fold.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick docs examples test-quantization test-app lint format types layout bench \
	bench-forgetting mutants clean

help:
	@echo 'make demo     find the expert, unlearn a topic, switch the adapter on and off (2 minutes)'
	@echo 'make test     run the tests, one process a core (TEST_PROCESSES=1 for one); make test-quick those of a part of'
	@echo '              the rooms, for the loop of work; make test-quantization those that need bitsandbytes and torchao,'
	@echo '              make test-app those that need gradio'
	@echo 'make docs     build the documentation into outputs/docs; every warning is an error'
	@echo 'make examples run the scripts and the notebook in examples/ on the bundled model'
	@echo 'make lint     ruff: rules and format'
	@echo 'make format   let ruff repair what it can'
	@echo 'make types    mypy'
	@echo 'make layout   check who imports whom'
	@echo 'make bench    all speed benchmarks, into outputs/bench (half an hour on two quiet cores);'
	@echo '              on a GPU: BENCH_DEVICE=cuda BENCH_SCALE=qwen1.5-moe-a2.7b or qwen3-30b-a3b'
	@echo 'make bench-forgetting   TOFU benchmark; needs UOE_DATA=<folder that holds tofu/>'
	@echo 'make mutants  change the code one operator at a time and see which tests notice, for an hour; call it again'
	@echo '              to go on; MUTANTS="--targets losses --sample 100" for a part'
	@echo 'make clean    remove the virtual environment and the outputs'

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"needs Python 3.11 or newer, got {v[0]}.{v[1]}; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --extra-index-url $(TORCH_INDEX) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(SETUP)

demo: $(SETUP)
	$(BIN)/uoe-peft demo --output_dir $(OUTPUT_DIR)

test: $(SETUP)
	$(BIN)/python -m pytest $(IN_PARALLEL) --durations=15

test-quick: $(SETUP)
	$(BIN)/python -m pytest $(IN_PARALLEL) --durations=5 $(QUICK_TESTS)

test-quantization: $(QUANTIZERS)
	PYTHONPATH=$(QUANTIZERS) $(BIN)/python -m pytest tests/tuner/test_quantised.py

$(QUANTIZERS): | $(SETUP)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ bitsandbytes torchao

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir outputs/docs

$(DOCS): $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

examples: $(SETUP)
	set -e; for script in examples/*.py; do echo "$$script"; $(BIN)/python -W ignore $$script; done
	$(BIN)/python -W ignore -m jupyter execute examples/*.ipynb

test-app: $(PAGE)
	PYTHONPATH=$(PAGE) $(BIN)/python -m pytest tests/cli/test_app_page.py

$(PAGE): | $(SETUP)
	grep -v '^pillow==' constraints.txt > $(VENV)/page-constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/page-constraints.txt --target $@ 'gradio>=6.31,<7'

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(SETUP)
	$(BIN)/mypy

layout: $(SETUP)
	$(BIN)/python -m pytest --quiet tests/test_layout.py

bench: $(SETUP)
	$(BENCH)/step_time.py $(BENCH_MODEL) --rounds 7 --output outputs/bench/step_time.json
	$(BENCH)/step_time.py $(BENCH_PLACE) --rounds 3 --vocab_size 151936 --methods uoe 'uoe, cached' lora full \
		--output outputs/bench/long_vocabulary.json
	$(BENCH)/step_sweeps.py $(BENCH_PLACE) --output outputs/bench/step_sweeps.json --plot outputs/bench/step_time.png
	$(BENCH)/epoch_time.py $(BENCH_MODEL) --output outputs/bench/epoch_time.json
	$(BENCH)/attribution.py $(BENCH_MODEL) --output outputs/bench/attribution.json
	$(BENCH)/toggle.py $(BENCH_PLACE) --output outputs/bench/toggle.json
	$(BENCH)/inference.py $(BENCH_MODEL) --rounds 21 --output outputs/bench/inference.json

bench-forgetting: $(SETUP)
	@test -n "$(UOE_DATA)" || { echo 'set UOE_DATA to the folder that holds tofu/'; exit 1; }
	$(BIN)/python benchmarks/tofu.py --data $(UOE_DATA)/tofu --output_dir outputs/tofu

mutants: $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -W ignore benchmarks/mutants.py $(MUTANTS)

clean:
	rm -rf $(VENV) $(OUTPUT_DIR) outputs
