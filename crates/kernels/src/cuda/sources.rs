//! The kernels' sources, which travel in the binary: NVRTC reads nothing from the disk.

/// A file of CUDA C++.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Its name, as it stands in an `#include` and in messages.
    pub name: &'static str,
    /// What it says.
    pub text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!($name) }
    };
}

/// The files with kernels: each becomes one module.
pub const SOURCES: &[Source] = &[
    source!("attend_long.cu"),
    source!("attend_merge.cu"),
    source!("attend_short.cu"),
    source!("bandwidth.cu"),
    source!("columns.cu"),
    source!("elementwise.cu"),
    source!("fold.cu"),
    source!("gemm.cu"),
    source!("gemv.cu"),
    source!("norm.cu"),
    source!("one_shot.cu"),
    source!("pack.cu"),
    source!("rope.cu"),
    source!("sample.cu"),
    source!("unpack.cu"),
];

/// What they include.
pub const HEADERS: &[Source] = &[
    source!("attend.cuh"),
    source!("device.cuh"),
    source!("sample.cuh"),
    source!("tree.cuh"),
    source!("weights.cuh"),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_of_the_folder_is_in_a_table() {
        for (extension, table) in [("cu", SOURCES), ("cuh", HEADERS)] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
            let mut found: Vec<String> = std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.extension().is_some_and(|e| e == extension))
                .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
                .collect();
            found.sort();
            let mut told: Vec<_> = table.iter().map(|source| source.name).collect();
            told.sort();
            assert_eq!(found, told);
        }
    }

    #[test]
    fn includes_are_own_headers() {
        for source in SOURCES.iter().chain(HEADERS) {
            for line in source.text.lines().filter(|line| line.starts_with("#include")) {
                let known = HEADERS.iter().any(|header| line == format!("#include \"{}\"", header.name));
                assert!(known, "{}: {line}: no such header in the table", source.name);
            }
        }
    }
}
