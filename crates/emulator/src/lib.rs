//! A GPU for tests: CUDA's driver API on the CPU, running the kernel sources of `kernels`.
//!
//! The emulator itself is C++ (`simt.h`, `simt/`, `driver/`, `nvrtc.cpp`, `cublaslt.cpp`, `nccl.cpp`); this crate compiles it,
//! together with the kernels, into `libcuda.so`, `libnvrtc.so`, `libcublasLt.so` and `libnccl.so.2`. Host code runs against them
//! unchanged: put the folder in `LD_LIBRARY_PATH` of a new process, or open the libraries by their full path before the first call
//! (their SONAMEs are the names that are looked for).
//!
//! What can be set, by environment variables that the libraries read:
//! - `PHALANX_EMULATOR_ORDER` = `forward`, `reverse`, `shuffled`: the order of a block's threads, and when a `cp.async` lands. By
//!   default each block takes one of these by chance. What depends on it lacks a barrier or a wait;
//! - `PHALANX_EMULATOR_LATE=1`: what is submitted to a stream runs not before somebody waits for it. What breaks lacks a wait;
//! - `PHALANX_EMULATOR_BESIDE=1`: it runs on a thread of the stream's own, so the host goes on while a kernel waits for others;
//! - `PHALANX_EMULATOR_DEVICES` (1) and `PHALANX_EMULATOR_MEMORY` (4 GiB, in bytes, for each device);
//! - `PHALANX_EMULATOR_SHARES=0`: memory cannot be shared with other processes.

mod compile;
mod open;

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use compile::Compiler;
pub use open::{open, open_with};

/// Why there is no emulator on this machine.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no emulated GPU: there is no C++ compiler `{0}`; install g++, or name one in $CXX")]
pub struct Absent(String);

/// The folder with the libraries, compiled when their sources changed.
///
/// # Errors
/// [`Absent`] where there is no C++ compiler; tests then say so and skip.
///
/// # Panics
/// If a source does not compile, in the compiler's words. Also where the compiler is absent though the environment says
/// `PHALANX_REQUIRE_EMULATOR=1`, so that a CI machine does not skip unnoticed.
pub fn libraries() -> Result<PathBuf, Absent> {
    static FOLDER: OnceLock<Result<PathBuf, Absent>> = OnceLock::new();
    FOLDER.get_or_init(|| Ok(compiler()?.libraries(&sources(), &kernels()))).clone()
}

/// A program of test sources (paths in this crate's folder) with the emulator linked in, without the project's kernels.
///
/// # Errors
/// [`Absent`] like [`libraries`].
///
/// # Panics
/// Like [`libraries`].
pub fn program(name: &str, test_sources: &[&str]) -> Result<PathBuf, Absent> {
    let mut all = sources();
    all.extend(test_sources.iter().map(|source| home().join(source)));
    Ok(compiler()?.program(name, &all))
}

fn compiler() -> Result<Compiler, Absent> {
    let found = Compiler::find(&home().join("src"), &kernel_folder(), &target());
    if let Err(absent) = &found {
        assert!(env::var("PHALANX_REQUIRE_EMULATOR").as_deref() != Ok("1"), "{absent}");
    }
    found
}

fn home() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn kernel_folder() -> PathBuf {
    home().join("../kernels/src/cuda")
}

/// Where cargo puts what it builds; a relative path is one from the workspace.
fn target() -> PathBuf {
    let chosen = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    home().join("../..").join(chosen).join("emulator")
}

/// The emulator's own sources.
fn sources() -> Vec<PathBuf> {
    let src = home().join("src");
    let mut all = files(&src, "cpp");
    all.extend(files(&src.join("simt"), "cpp"));
    all.extend(files(&src.join("driver"), "cpp"));
    all
}

fn kernels() -> Vec<PathBuf> {
    files(&kernel_folder(), "cu")
}

/// The files of a folder with this extension, by name.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = folder.read_dir().unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut found: Vec<_> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    found
}
