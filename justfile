# What people type most; `.ci/run` is what CI runs.

# the bundled model, an embedded cluster of two workers
demo prompt="In the beginning":
    cargo run --release -- generate --prompt "{{prompt}}"

# everything that must pass before a commit
check: fmt lint test

fmt:
    cargo fmt --all --check

lint:
    cargo clippy --workspace --all-targets -- -D warnings

test:
    cargo test --workspace

deny:
    cargo deny --all-features check bans licenses sources

# kernels against this machine's own ceilings
kernel-speed:
    cargo run --release -p phalanx-kernels --example kernel_speed
