#!/bin/sh
# `protoc` for build scripts, out of tools/protoc. CARGO_MAKEFLAGS would tie this cargo to the jobs of the one that waits for it;
# flags and wrappers of the outer build are of no use to it.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
exec env -u CARGO_MAKEFLAGS -u CARGO_ENCODED_RUSTFLAGS -u RUSTFLAGS -u RUSTC_WRAPPER -u RUSTC_WORKSPACE_WRAPPER -u CARGO_BUILD_TARGET \
    "${CARGO:-cargo}" run --quiet --locked --manifest-path "$root/tools/protoc/Cargo.toml" --target-dir "$root/target/protoc" -- "$@"
