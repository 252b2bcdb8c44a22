# The two commands to know: `make demo` and `make test`. Both set up what is missing first.
SHELL := bash
RUN := scripts/with-tools
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
KAREZ := $(TARGET)/release/karez

.PHONY: demo build test test-long bench simulate lint doc model install clean

demo: build
	@minilm=$$(scripts/fetch-minilm) || minilm=; \
	$(KAREZ) demo $${minilm:+--minilm "$$minilm"}

# With the features of the whole workspace, so that benchmarks compile no dependency a second time.
build:
	@$(RUN) cargo build --release --locked --workspace --bin karez

# nextest where it is installed, cargo's own runner elsewhere.
test:
	@minilm=$$(scripts/fetch-minilm) || minilm=; export KAREZ_TEST_MINILM="$$minilm"; \
	if cargo nextest --version >/dev/null 2>&1; \
	then $(RUN) cargo nextest run --workspace --locked --no-fail-fast; \
	else $(RUN) cargo test --workspace --locked --no-fail-fast; fi

# Many more seeds, random kills and tamperings: an hour or so.
test-long:
	@export KAREZ_SEEDS=$${KAREZ_SEEDS:-5000} KAREZ_LONG=1; $(MAKE) test

bench: build
	@$(RUN) scripts/bench

# Worlds that run the real minds; a page about each in target/simulations/. DATA=folder brings measured latencies.
SCENARIOS ?= country-dark owners-at-nine donated-only
simulate:
	@$(RUN) cargo run --release --locked --quiet -p karez-simulations --bin simulate -- $(if $(DATA),--data "$(DATA)") \
		$(SCENARIOS:%=simulations/scenarios/%.toml)

lint:
	@cargo fmt --all --check
	@$(RUN) cargo clippy --workspace --all-targets --locked -- -D warnings
	@RUSTDOCFLAGS="-D warnings" $(RUN) cargo doc --workspace --no-deps --locked

doc:
	@$(RUN) cargo doc --workspace --no-deps --locked

# Makes the shipped model again from its corpus; takes about ten minutes.
model:
	@$(RUN) cargo run --release --locked -p karez-engine --example make_model

install: build
	install -Dm755 $(KAREZ) $(DESTDIR)$(or $(PREFIX),/usr/local)/bin/karez

clean:
	cargo clean
