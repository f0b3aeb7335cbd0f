//! Keeps the structure true to ARCHITECTURE.md: module headers, file sizes, and the arrows between crates.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A longer file says why at its top, in a line with the word "lines".
const MAX_LINES: usize = 500;

/// Which crates of this workspace each crate may depend on. ARCHITECTURE.md explains them.
const ARROWS: &[(&str, &[&str])] = &[
    ("auth", &[]),
    ("engine", &[]),
    ("emulator", &[]),
    ("kernels", &[]),
    ("comm", &["auth", "kernels"]),
    ("model", &["comm", "engine", "kernels"]),
    ("cluster", &["auth", "engine"]),
    ("worker", &["auth", "cluster", "comm", "engine", "kernels", "model"]),
    ("client", &["auth", "cluster"]),
    ("coordinator", &["auth", "cluster", "engine"]),
    ("gateway", &["client", "cluster", "coordinator", "engine"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("readable folder") {
        let path = entry.expect("readable entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn all_rust_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    rust_files(&root().join("crates"), &mut files);
    rust_files(&root().join("tests"), &mut files);
    assert!(files.len() > 50, "found only {} files: is this the workspace?", files.len());
    files
}

#[test]
fn every_module_opens_with_its_purpose() {
    let silent: Vec<_> = all_rust_files()
        .into_iter()
        .filter(|path| !fs::read_to_string(path).expect("readable file").starts_with("//! "))
        .collect();
    assert!(silent.is_empty(), "no `//!` at the top of {silent:#?}");
}

#[test]
fn no_file_is_long_without_a_reason() {
    let long: Vec<_> = all_rust_files()
        .into_iter()
        .filter(|path| {
            let text = fs::read_to_string(path).expect("readable file");
            let header = text.lines().take_while(|line| line.starts_with("//!"));
            text.lines().count() > MAX_LINES && !header.into_iter().any(|line| line.contains("lines"))
        })
        .collect();
    assert!(long.is_empty(), "over {MAX_LINES} lines without a reason: {long:#?}");
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let arrows: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let own: Vec<&str> = arrows.keys().copied().chain(["cli"]).collect();
    for (name, allowed) in arrows {
        let manifest =
            fs::read_to_string(root().join("crates").join(name).join("Cargo.toml")).expect("manifest");
        let dependencies = manifest.split("[dependencies]").nth(1).expect("a [dependencies] table");
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        for line in dependencies.lines() {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            let outside = own.contains(&dependency) && !allowed.contains(&dependency);
            assert!(!outside, "crate `{name}` may not depend on `{dependency}`");
        }
    }
}

#[test]
fn folders_of_crates_are_the_table() {
    let mut found: Vec<String> = fs::read_dir(root().join("crates"))
        .expect("crates")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    let mut told: Vec<String> =
        ARROWS.iter().map(|(name, _)| (*name).to_owned()).chain(["cli".into()]).collect();
    told.sort();
    assert_eq!(found, told);
}

/// Where `unsafe` may stand beside `kernels`, and why.
const UNSAFE: &[&str] = &[
    // Opens the emulator's libraries.
    "crates/emulator/src/open.rs",
];

#[test]
fn only_kernels_has_unsafe_code() {
    let unsafe_files: Vec<_> = all_rust_files()
        .into_iter()
        .filter(|path| !path.starts_with(root().join("crates/kernels")) && !path.ends_with("tidy.rs"))
        .filter(|path| !UNSAFE.iter().any(|allowed| path.ends_with(allowed)))
        .filter(|path| {
            let text = fs::read_to_string(path).expect("readable file");
            text.lines().any(|line| line.trim_start().starts_with("unsafe ") || line.contains("= unsafe "))
        })
        .collect();
    assert!(unsafe_files.is_empty(), "unsafe outside `kernels`: {unsafe_files:#?}");
}
