# The recipes of the repository; `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build dist demo up test interop templates bench bench-engine lint fuzz clean

# dev builds once for tests and programs alike; release is what users run.
PROFILE ?= release
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BUILT := $(TARGET_DIR)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/tether
# A program that is built already; given, nothing is built.
TETHER ?=
PROGRAM := $(or $(TETHER),$(BUILT))

# What the engine is measured with: shape and quantisation.
BENCH_MODELS ?= qwen2.5-0.5b-q4_0 qwen2.5-0.5b-q8_0 tinyllama-1.1b-q4_0 tinyllama-1.1b-q8_0

help: ## Lists the recipes
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 22

build: ## Builds the program (PROFILE=dev|release)
ifeq ($(TETHER),)
	@scripts/setup build
	scripts/with-progress cargo build --profile $(PROFILE) --package tether
endif

# What gives the command after it a CUDA toolkit, where one is needed.
WITH_CUDA = $(if $(findstring cuda,$(FEATURES)),scripts/with-cuda)

# Without this machine's own instructions, and with libraries found beside the program, wherever that lies.
dist: export RUSTFLAGS = -C link-arg=-Wl,-rpath,$$ORIGIN
dist: export CARGO_TARGET_DIR = $(abspath $(TARGET_DIR))/dist
dist: ## Makes dist/tether, a release that is fast on any processor (FEATURES=portable,cuda for GPUs too, CUDA_ARCHS=90)
	@scripts/setup $(if $(WITH_CUDA),cuda,build)
	@# The build of llama.cpp stumbles over the links that it left there.
	rm -f $(abspath $(TARGET_DIR))/dist/release/{,deps/}lib{llama,ggml}*.so
	$(WITH_CUDA) scripts/with-progress cargo build --release --package tether --features $(or $(FEATURES),portable)
	$(WITH_CUDA) scripts/dist $(abspath $(TARGET_DIR))/dist/release dist/tether

demo: build ## Starts a network, asks it, kills a worker, asks again, and cleans up
	@$(PROGRAM) demo

up: build ## Starts a network and keeps it running
	@$(PROGRAM) up

test: ## Runs every test, and replays what fuzzers found
	@scripts/setup test
	scripts/with-progress cargo nextest run --workspace
	cargo test --workspace --doc --quiet

interop: build ## Runs OpenAI's SDKs, Node's Hyperswarm, llama-server and our client against ours
	@scripts/setup interop
	TETHER_BIN=$(PROGRAM) interop/run

templates: ## Renders the chat templates of a folder beside jinja2 (FOLDER=…)
	@scripts/setup interop
	@test -n "$(FOLDER)" || { echo 'name a folder: make templates FOLDER=…'; exit 2; }
	scripts/with-progress cargo build --package tether-engine --no-default-features --example render_template
	TETHER_RENDERER=$(abspath $(TARGET_DIR))/debug/examples/render_template interop/run templates $(abspath $(FOLDER))

bench: ## Measures what docs/benchmarks.md promises
	@scripts/setup bench
	BENCH_MODEL=$(abspath $(TARGET_DIR))/bench/qwen2.5-0.5b-q4_0.gguf \
	  scripts/with-progress cargo bench --workspace --bench '*'

bench-engine: export BENCH_FOLDER := $(abspath $(TARGET_DIR))/bench
bench-engine: export BENCH_UPSTREAM := $(abspath $(TARGET_DIR))/bench/upstream/build/bin
bench-engine: export BENCH_MODELS := $(BENCH_MODELS)
bench-engine: ## Measures the engine beside llama-server (BENCH_MODELS=…, BENCH_MEASURES=prompt, BENCH_ROUNDS=1)
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

fuzz: ## Fuzzes every reader of foreign bytes (FUZZ_SECONDS=300 each)
	@scripts/setup fuzz
	scripts/fuzz

clean: ## Removes what was built and installed here
	cargo clean
	rm -rf interop/.venv* interop/node/node_modules interop/hyperswarm/node_modules clients/js/node_modules fuzz/artifacts
