# `just check` runs what CI runs, with the tools already installed; `bash .ci/run` installs them too.

check: fmt clippy doc deny typos files test bench compare packages fuzz clients

# Before each push: format, clippy, unit tests, and one file of black-box tests.
quick file='guard':
    cargo fmt --check
    cargo clippy --all-targets --locked -- -D warnings
    cargo test --locked --lib
    cargo test --locked --test black_box -- {{ file }}::

fmt:
    cargo fmt --check
    cargo fmt --check --manifest-path fuzz/Cargo.toml
    cargo fmt --check --manifest-path benches/compare/Cargo.toml

clippy:
    cargo clippy --all-targets --locked -- -D warnings
    cargo clippy --manifest-path fuzz/Cargo.toml --locked -- -D warnings
    cargo clippy --manifest-path benches/compare/Cargo.toml --locked -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --locked

deny:
    cargo deny --locked check -D unnecessary-skip licenses bans sources

typos:
    typos

files:
    hadolint Dockerfile
    actionlint
    zizmor --offline .github/workflows
    check-jsonschema --builtin-schema vendor.compose-spec config/compose.yaml
    kubernetes-validate --strict config/kubernetes/*.yaml
    promtool check config config/prometheus.yaml

# The second run searches everything that is put out at `trace` for secrets, where there are some.
test:
    cargo test --locked
    BLACK_BOX_LOG_FILTER=trace cargo test --locked --test black_box -- \
        secrets:: credential egress:: rotation:: authenticate:: run:: check::

# Each night: what `test` does with the same seeds each time, with others. What fails prints its seed.
nightly:
    seed=$(date +%s) && FAULTS_SEED=$seed FAULTS_COUNT=5000 SOAK_SEED=$seed CRASH_SEED=$seed CRASH_COUNT=200 \
        cargo test --locked --test black_box -- faults:: soak:: crash:: --nocapture
    SIMULATION_SEEDS=200000 cargo test --locked --test simulation

# Half an hour of mixed load, in which nothing may grow or get lost.
soak:
    SOAK_SECONDS=1800 cargo test --locked --release --test black_box soak:: -- --nocapture

# Instructions of a request, against what was agreed; needs valgrind.
bench:
    cargo bench --locked --bench instructions

# After a change that is worth its instructions, or saves some: agrees to what is counted now.
counts:
    UPDATE_COUNTS=1 cargo bench --locked --bench instructions

# Writes the references in `docs/` anew, which `test` compares with the program.
docs:
    UPDATE_DOCS=1 cargo test --locked --test black_box docs::

# That the comparison with other proxies works; benches/compare/README.md says how to make one.
compare:
    cargo build --locked
    python3 benches/compare/compare.py --smoke

# Needs cargo-cyclonedx, which `.ci/run` installs under target/ci/bin. The program is static if Rust has the musl target.
# An archive as a release has it, its bill of materials and checksums, in target/dist.
release *options:
    python3 .ci/release.py {{ options }}

# The crate, the image, the release, what is in config/: built and started. As root, with the Debian packages of
# `.ci/run`, cargo-cyclonedx, and `pip install -r tests/packages/requirements.txt`.
packages:
    cargo build --locked
    cargo package --locked --allow-dirty
    python3 -m unittest discover --start-directory tests/packages --verbose

# Each target for a short while; fuzz/README.md says how to go on from there.
fuzz:
    for target in $(cargo fuzz list); do \
        cargo fuzz run --sanitizer none --codegen-units 16 $target -- -max_total_time=15 -max_len=4096 -timeout=10 || exit; \
    done

# Real clients and a browser against the binary that `test` built; needs Node.js, Chromium, and
# `pip install -r tests/clients/requirements.txt`.
clients:
    cargo build --locked
    cd tests/clients && npm ci && node --test
    python3 -m unittest discover --start-directory tests/clients --verbose
