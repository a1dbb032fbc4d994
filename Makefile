# The recipes of the repository; `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build mock dist demo up test simulate linearizability quotas cuts interop frameworks agents kills schema rolling drill points templates bench bench-gateway bench-engine bench-failover lint audit fuzz clean

# dev shares one build between tests and programs; release is for users.
PROFILE ?= release
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BUILT := $(TARGET_DIR)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/tether
# A program that already exists. If it is set, nothing is built.
TETHER ?=
PROGRAM := $(or $(TETHER),$(BUILT))
# The program with mocks in place of engines, which is built beside it.
MOCK := $(dir $(PROGRAM))examples/mock

# The models of the engine benchmark: shape and quantisation.
BENCH_MODELS ?= qwen2.5-0.5b-q4_0 qwen2.5-0.5b-q8_0 tinyllama-1.1b-q4_0 tinyllama-1.1b-q8_0

help: ## Lists the recipes
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 22

build: ## Builds the program (PROFILE=dev|release)
ifeq ($(TETHER),)
	@scripts/setup build
	scripts/with-progress cargo build --profile $(PROFILE) --package tether
endif

# Runs the next command with a CUDA toolkit, if FEATURES needs one.
WITH_CUDA = $(if $(findstring cuda,$(FEATURES)),scripts/with-cuda)

# The program uses no instructions that are specific to this machine, and finds libraries next to itself in any folder.
dist: export RUSTFLAGS = -C link-arg=-Wl,-rpath,$$ORIGIN
dist: export CARGO_TARGET_DIR = $(abspath $(TARGET_DIR))/dist
dist: ## Builds dist/tether, a release that is fast on any processor (FEATURES=portable,cuda for GPUs too, CUDA_ARCHS=90)
	@scripts/setup $(if $(WITH_CUDA),cuda,build)
	@# The build of llama.cpp fails if the links of an earlier build exist.
	rm -f $(abspath $(TARGET_DIR))/dist/release/{,deps/}lib{llama,ggml}*.so
	$(WITH_CUDA) scripts/with-progress cargo build --release --package tether --features $(or $(FEATURES),portable)
	$(WITH_CUDA) scripts/dist $(abspath $(TARGET_DIR))/dist/release dist/tether

demo: build ## Starts a network, sends a request, kills a worker, sends another, and cleans up
	@$(PROGRAM) demo

up: build ## Starts a network and keeps it running
	@$(PROGRAM) up

test: ## Runs every test, and replays the inputs that fuzzers found
	@scripts/setup test
	scripts/with-progress cargo nextest run --workspace
	cargo test --workspace --doc --quiet

simulate: ## Simulates whole networks with faults, one for each seed (SEEDS=1000, FIRST=0), or repeats one (SEED=7)
	scripts/with-progress cargo build --package tether-simulation
	$(abspath $(TARGET_DIR))/debug/simulate $(if $(SEED),--seed $(SEED),$(or $(SEEDS),1000) $(or $(FIRST),0))

linearizability: ## Checks the outcomes of calls of many threads to the store (OPERATIONS=1000000)
	OPERATIONS=$(or $(OPERATIONS),1000000) scripts/with-progress cargo test --package tether-simulation --test it \
	  -- --ignored any_number_of_calls_at_once_have_an_order

quotas: ## Kills a process within quotas again and again (OPERATIONS=1000000)
	OPERATIONS=$(or $(OPERATIONS),1000000) scripts/with-progress cargo test --package tether-metadata-store --test it \
	  -- --ignored --nocapture no_kill_overspends

cuts: ## Cuts answers in JSON schemas and function calls a thousand times, and continues each on another engine
	@scripts/setup test
	scripts/with-progress cargo nextest run --package tether-engine --run-ignored only -E 'test(a_thousand_cuts)'

mock: build
ifeq ($(TETHER),)
	scripts/with-progress cargo build --profile $(PROFILE) --package tether --example mock
endif

interop: mock ## Tests against SDKs, the AI SDK, Node's Hyperswarm, llama-server and our client for Node
	@scripts/setup interop
	TETHER_BIN=$(PROGRAM) TETHER_MOCK=$(MOCK) interop/run

frameworks: mock ## Tests openai-agents, pydantic-ai, instructor, LiteLLM and LangChain before mocks
	@scripts/setup interop
	TETHER_MOCK=$(MOCK) TETHER_BIN=$(PROGRAM) interop/run frameworks

agents: mock ## Has Claude Code, Codex, opencode and qwen-code use a tool, before mocks
	@scripts/setup interop
	TETHER_MOCK=$(MOCK) TETHER_BIN=$(PROGRAM) interop/run agents

kills: mock ## Kills a worker every ten seconds while frameworks and coding agents take turns (KILLS=6)
	@scripts/setup interop
	TETHER_MOCK=$(MOCK) TETHER_BIN=$(PROGRAM) KILLS=$(or $(KILLS),6) interop/run kills

schema: mock ## Fuzzes the HTTP API by its own description, with Schemathesis (EXAMPLES=100)
	@scripts/setup interop
	TETHER_MOCK=$(MOCK) TETHER_BIN=$(PROGRAM) interop/run schema --max-examples $(or $(EXAMPLES),100)

rolling: build ## Restarts every process of a network in turn while clients ask, and counts failures (REQUESTS=10000)
	@scripts/setup interop
	TETHER_BIN=$(PROGRAM) REQUESTS=$(or $(REQUESTS),10000) interop/run servers -s -k rolling

drill: build ## Kills, freezes and cuts off the processes of private networks, and counts what clients lost (KILLS=100, SEED=1)
	@$(PROGRAM) drill --kills $(or $(KILLS),100) $(if $(SEED),--seed $(SEED))

points: ## Kills the processes of private networks at every exact point of a request (KILLS=10, SEED=1)
	@scripts/setup build
	scripts/with-progress cargo build --profile $(PROFILE) --package tether --features failpoints --target-dir $(TARGET_DIR)/points
	$(TARGET_DIR)/points/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/tether drill --campaign point --kills $(or $(KILLS),10) $(if $(SEED),--seed $(SEED))

templates: ## Compares the chat templates of a folder with jinja2 (FOLDER=…)
	@scripts/setup interop
	@test -n "$(FOLDER)" || { echo 'set a folder: make templates FOLDER=…'; exit 2; }
	scripts/with-progress cargo build --package tether-engine --no-default-features --example render_template
	TETHER_RENDERER=$(abspath $(TARGET_DIR))/debug/examples/render_template interop/run templates $(abspath $(FOLDER))

bench: ## Runs the benchmarks of docs/benchmarks.md
	@scripts/setup bench
	BENCH_MODEL=$(abspath $(TARGET_DIR))/bench/qwen2.5-0.5b-q4_0.gguf \
	  scripts/with-progress cargo bench --workspace --bench '*'

bench-failover: export BENCH_MODELS := $(abspath $(TARGET_DIR))/models/smollm2.gguf $(abspath $(TARGET_DIR))/bench/qwen2.5-0.5b-q4_0.gguf
bench-failover: ## Measures how long answers pause when their worker is killed, at 500, 8k and 64k tokens of context
	@scripts/setup bench
	@scripts/setup test
	for model in $$BENCH_MODELS; do BENCH_MODEL=$$model scripts/with-progress cargo bench --package tether --bench failover; done

bench-gateway: export BENCH_ROUTERS := $(abspath $(TARGET_DIR))/bench/routers/bin
bench-gateway: ## Compares the way of a request with other routers, each on one core
	@scripts/setup bench-gateway
	scripts/with-progress cargo bench --package tether --bench gateway --no-run
	taskset -c 1 cargo bench --quiet --package tether --bench gateway

bench-engine: export BENCH_FOLDER := $(abspath $(TARGET_DIR))/bench
bench-engine: export BENCH_UPSTREAM := $(abspath $(TARGET_DIR))/bench/upstream/build/bin
bench-engine: export BENCH_MODELS := $(BENCH_MODELS)
bench-engine: ## Compares the engine with llama-server (BENCH_MODELS=…, BENCH_MEASURES=prompt, BENCH_ROUNDS=1)
	@scripts/setup bench-engine
	scripts/with-progress cargo bench --package tether-engine --bench engine
	scripts/with-progress cargo bench --package tether-engine --bench sampler
	TETHER_RANDOM_MODELS=$$BENCH_FOLDER cargo test --release --package tether-engine --test it -- --ignored --nocapture realistic
	for model in $(BENCH_MODELS); do \
	  BENCH_MODEL=$$BENCH_FOLDER/$$model.gguf scripts/with-progress cargo bench --package tether --bench throughput; \
	done

lint: ## Checks format, lints, floors, names, links, licences
	@scripts/setup lint
	cargo fmt --all --check
	scripts/with-progress cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --package tether-engine --no-default-features --all-targets -- -D warnings
	cargo xtask tidy $(if $(TETHER),--tether $(abspath $(TETHER)))
	cargo deny --log-level error check bans licenses sources

audit: ## Checks dependencies for known vulnerabilities (ADVISORIES=FOLDER, a clone of RustSec's advisory-db)
	@scripts/setup lint
	scripts/audit "$(ADVISORIES)"

fuzz: ## Fuzzes every decoder of untrusted bytes (FUZZ_SECONDS=300 each)
	@scripts/setup fuzz
	scripts/fuzz

clean: ## Removes build outputs and installed packages
	cargo clean
	rm -rf interop/.venv* interop/{node,ai-sdk,agents}/node_modules interop/hyperswarm/node_modules clients/js/node_modules fuzz/artifacts
