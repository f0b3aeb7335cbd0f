//! The GPU suite's probe, on the emulator: it takes the cases that the scripts of `tests/gpu` write, and says what is wrong with others.
#![cfg(feature = "cuda")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use phalanx_tests::process::{Ended, Program};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use serde_json::{Value, json};

const PROBE: Program = Program(env!("CARGO_BIN_EXE_phalanx-probe"));

/// Runs the probe on f32 inputs `[rows, cols]`; none without an emulator.
fn probe(folder: &Path, cases: &Value, inputs: &[(&str, [usize; 2], &[f32])]) -> Option<Ended> {
    let libraries = match emulator::libraries() {
        Ok(libraries) => libraries,
        Err(absent) => {
            eprintln!("skipped: {absent}");
            return None;
        }
    };
    let bytes: Vec<_> = inputs.iter().map(|(name, shape, x)| (*name, *shape, bytes(x))).collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a tensor"))
    });
    serialize_to_file(views, None, &folder.join("inputs.safetensors")).expect("inputs");
    fs::write(folder.join("cases.json"), cases.to_string()).expect("cases");
    let program = PROBE
        .command(["ops", folder.to_str().expect("UTF-8")])
        .env("LD_LIBRARY_PATH", libraries.to_str().expect("UTF-8"))
        .env("PHALANX_KERNEL_CACHE", folder.to_str().expect("UTF-8"));
    Some(program.run())
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn outputs_are_named_after_cases() {
    let folder = tempfile::tempdir().expect("a folder");
    let weight: Vec<f32> = (0..16).map(|i| if i % 9 == 0 { 2.0 } else { 0.0 }).collect(); // twice the first two columns
    let x: Vec<f32> = (1..=16).map(|i| i as f32).collect();
    let cases = json!([
        {"name": "product", "deterministic": true, "op": {"linear": {"x": "x", "rows": [1, 2], "weights": [{"plain": "w"}]}}},
        {"name": "sum", "op": {"tree_reduce": {"sums": "x", "width": 2}}},
        {"name": "picked", "op": {"gather": {"x": "x", "rows": [1]}}},
    ]);
    let Some(ended) = probe(folder.path(), &cases, &[("x", [2, 8], &x), ("w", [2, 8], &weight)]) else {
        return;
    };
    assert!(ended.status.success(), "{}", ended.stderr);
    let file = fs::read(folder.path().join("outputs.safetensors")).expect("outputs");
    let outputs = SafeTensors::deserialize(&file).expect("outputs");
    let found: BTreeMap<_, _> =
        outputs.iter().map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec())).collect();
    let sums: Vec<f32> = (0..8).map(|i| (10 + 2 * i) as f32).collect();
    let expected = BTreeMap::from([
        ("product.1".to_owned(), bytes(&[2.0, 4.0])),
        ("product.2".to_owned(), bytes(&[2.0, 4.0, 18.0, 20.0])),
        ("sum.0".to_owned(), bytes(&sums)),
        ("sum.1".to_owned(), bytes(&sums)),
        ("picked".to_owned(), bytes(&x[8..])),
    ]);
    assert_eq!(found, expected);
}

#[test]
fn a_case_that_cannot_be_run_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    for (op, words) in [
        (json!({"gather": {"x": "y", "rows": [0]}}), ["case odd", "input y"]),
        (json!({"gather": {"x": "x", "rows": [7]}}), ["case odd", "a sampled row past 1"]),
        (json!({"guess": {}}), ["cases.json", "guess"]),
    ] {
        let cases = json!([{"name": "odd", "op": op}]);
        let Some(ended) = probe(folder.path(), &cases, &[("x", [1, 8], &[1.0; 8])]) else { return };
        assert!(!ended.status.success(), "{cases}");
        assert!(words.iter().all(|word| ended.stderr.contains(word)), "{}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
}
