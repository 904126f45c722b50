# `make demo` and `make test` set themselves up in .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chaos audit gpu-check benchmarks peers pictures clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed .venv/browser .venv/prometheus
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Three hundred faults on a real Ray and a real S3 server; some two hours on two cores. Goes on where it was stopped.
chaos: .venv/installed
	$(BIN)/python -m tests.chaos --faults 300 --seed 1 $(if $(wildcard build/chaos/report.json),--resume)

# Known vulnerabilities of the pinned dependencies; says so where there is no network to ask.
audit:
	$(PYTHON) .ci/audit.py

# What only a machine with an NVIDIA GPU can tell: parity, bf16 tolerance, throughput, out-of-memory handling.
gpu-check: .venv/installed
	$(BIN)/python -m benchmarks.gpu_check

# The tables of docs/results.md; an hour and a half on two cores, and nothing else should run meanwhile.
benchmarks: .venv/installed build/demo/model/config.json
	$(BIN)/python -m benchmarks.engine --model build/demo/model --corpus build/demo/corpus/held-out
	$(BIN)/python -m benchmarks.pipeline --model build/demo/model --corpus build/demo/corpus/held-out
	$(BIN)/python -m benchmarks.limits --model build/demo/model
	$(BIN)/python -m benchmarks.soak --model build/demo/model --corpus build/demo/corpus/held-out

# The engine and whole jobs beside transformers, ONNX Runtime and OpenVINO, which it installs; on a quiet machine, too.
peers: .venv/installed build/demo/model/config.json
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -m benchmarks.peers --model build/demo/model --corpus build/demo/corpus/held-out

build/demo/model/config.json: .venv/installed
	$(BIN)/python examples/demo.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Installing Ray, torch and what else is needed into .venv; this takes about two minutes and prints nothing."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# 250 MB that only the tests of pages need; without it they are skipped, but not in CI.
.venv/browser: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]' || echo "There is no browser for this machine: see tests/look"
	touch $@

# Debian's Prometheus and promtool, 100 MB that only tests need; without them these are skipped, but not in CI.
.venv/prometheus: APT := apt-get -qq --option APT::Sandbox::User=root
.venv/prometheus: .venv/installed
	mkdir -p $@-deb && cd $@-deb && { $(APT) download prometheus || { $(APT) update && $(APT) download prometheus; }; } && \
	    dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb || echo "There is no Prometheus here: see tests/monitoring"
	touch $@

# The pictures of the documentation.
pictures: .venv/browser build/demo/scores/_SUCCESS
	$(BIN)/python -m tests.look.pictures

build/demo/scores/_SUCCESS: .venv/installed
	$(BIN)/python examples/demo.py

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
