//! The benchmarks run and give all of their figures. No speed is asserted.

use std::path::Path;

use phalanx_tests::process::Program;
use serde_json::Value;

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));

/// Checks that every number below `value` is one; a number that is not becomes null in JSON.
fn assert_finite(path: &str, value: &Value) {
    match value {
        Value::Null => panic!("{path} is null"),
        Value::Number(number) => assert!(number.as_f64().is_some_and(f64::is_finite), "{path}: {number}"),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, item)| assert_finite(&format!("{path}[{i}]"), item));
        }
        Value::Object(map) => {
            map.iter().for_each(|(key, item)| assert_finite(&format!("{path}.{key}"), item))
        }
        Value::Bool(_) | Value::String(_) => {}
    }
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Runs it with the emulator as its GPU, of 2 GiB.
fn bench_gpu(libraries: &Path, args: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let (cache, tables) = (file("cache"), file("tables.md"));
    let small = ["bench", "gpu", "--shape", "tiny", "--ceiling-memory", "1MiB", "--ceiling-matrix", "32"];
    let output = ["--markdown", &tables, "--json"];
    let ended = PHALANX
        .command([&small[..], args, &output].concat())
        .env("LD_LIBRARY_PATH", libraries.to_str().expect("UTF-8"))
        .env("PHALANX_EMULATOR_MEMORY", &(2u64 << 30).to_string())
        .env("PHALANX_KERNEL_CACHE", &cache)
        .run();
    let json = json(&ended.success());
    (json, std::fs::read_to_string(&tables).expect("the tables"))
}

#[test]
fn bench_gpu_gives_all_figures() {
    let libraries = match emulator::libraries() {
        Ok(folder) => folder,
        Err(absent) => return eprintln!("skipped: {absent}"),
    };
    let args = ["--weights", "bf16,int4,int8,fp8", "--batch", "1,3", "--context", "100,200001"];
    let more = ["--prefill", "40,70", "--max-batch-tokens", "64", "--steps", "1"];
    let (report, tables) = bench_gpu(&libraries, &[&args[..], &more].concat());
    assert_finite("report", &report);
    let of_report = [
        "engine",
        "version",
        "device",
        "path",
        "memory_bytes",
        "shape",
        "parameters",
        "ceilings",
        "loads",
        "decode",
        "attention",
        "attention_in_step",
        "prefill",
        "deterministic_cost",
        "skipped",
        "failures",
    ];
    assert_eq!(keys(&report), of_report);
    assert_eq!(report["failures"], json("[]"));
    let rows = |name: &str| report[name].as_array().expect("an array").clone();
    // Each of four formats, two batches, contexts of 100 and 512, both ways; the other context is too long.
    assert_eq!(rows("decode").len(), 4 * 2 * 2 * 2);
    assert_eq!(rows("prefill").len(), 4 * 2 * 2);
    assert_eq!(rows("attention").len(), 2);
    assert_eq!(rows("skipped").len(), 5 * 2);
    assert!(rows("skipped").iter().all(|row| row["why"] == "the model's context is 200000 tokens"));
    let of_decode = [
        "weights",
        "deterministic",
        "batch",
        "context",
        "ms",
        "device_ms",
        "single_ms",
        "tokens_per_second",
        "weight_bytes",
        "kv_bytes",
        "gb_s",
        "share",
    ];
    assert_eq!(keys(&rows("decode")[0]), of_decode);
    let of_prefill = [
        "weights",
        "deterministic",
        "tokens",
        "chunk",
        "ms",
        "tokens_per_second",
        "tflop",
        "tflop_s",
        "share",
    ];
    assert_eq!(keys(&rows("prefill")[0]), of_prefill);
    for spread in ["read_gb_s", "copy_gb_s", "gemm_tflop_s"] {
        assert_eq!(keys(&report["ceilings"][spread]), ["median", "min", "max"]);
    }
    // A layer has 128·384 weights in q, k and v, 128·256 in o, 3·128·512 in the FFN, the head 512·128; units are two.
    let (layer, head) = (128 * 384 + 128 * 256 + 3 * 128 * 512, 512 * 128);
    let bytes = |weights: &str| {
        let of = rows("decode").into_iter().find(|row| row["weights"] == weights).expect(weights);
        assert_eq!(of["kv_bytes"], 100 * 2 * 2 * (2 * 32) * 2);
        of["weight_bytes"].as_u64().expect("bytes")
    };
    assert_eq!(bytes("bf16"), 2 * (2 * layer + head));
    assert_eq!(bytes("int8"), 2 * (layer + layer / 128 * 5) + 2 * head);
    assert_eq!(bytes("fp8"), 2 * (layer + 4 * (384 + 1024 + 2 * 2 * 128)) + head + 4 * 512);
    for words in ["# tiny on ", "## Decoding", "## Prefill", "| share of bandwidth |", "not measured: "] {
        assert!(tables.contains(words), "{words}: {tables}");
    }
}

#[test]
fn bench_gpu_says_what_has_no_room() {
    let libraries = match emulator::libraries() {
        Ok(folder) => folder,
        Err(absent) => return eprintln!("skipped: {absent}"),
    };
    let args =
        ["--weights", "bf16", "--batch", "64", "--context", "200000", "--prefill", "1", "--steps", "1"];
    let (report, _) = bench_gpu(&libraries, &[&args[..], &["--deterministic", "off"]].concat());
    let skipped: Vec<String> =
        report["skipped"].as_array().expect("an array").iter().map(|row| row.to_string()).collect();
    let [attention, decode] = &skipped[..] else { panic!("{skipped:?}") };
    assert!(attention.contains("no memory for the KV cache"), "{attention}");
    // 64 · 200,000 tokens of 2 layers of 2 heads of 32.
    assert!(decode.contains("6.55 GB of keys and values"), "{decode}");
    // Both with the short context alone.
    assert_eq!(report["decode"].as_array().expect("an array").len(), 1);
    assert!(report["deterministic_cost"]["decode"].is_null());
}

#[test]
fn bench_gpu_says_in_a_sentence_what_is_wrong() {
    let empty = tempfile::tempdir().expect("a folder");
    let path = empty.path().to_str().expect("UTF-8");
    PHALANX.command(["bench", "gpu", "--shape", "tiny"]).env("LD_LIBRARY_PATH", path).run().failure(&["GPU"]);
    PHALANX.run(["bench", "gpu", "--device", "cpu"]).failure(&["--device cpu", "bench step"]);
}

#[test]
fn bench_load_tells_the_share_of_plain_reading() {
    for more in [&["--cold"][..], &[]] {
        let ended =
            PHALANX.run([&["bench", "load", "--runs", "2", "--threads", "1", "--json"][..], more].concat());
        let figures = json(&ended.success());
        assert_finite("figures", &figures);
        let of_load = [
            "model",
            "device",
            "cold",
            "bytes",
            "readers",
            "load_seconds",
            "read_seconds",
            "load_gb_s",
            "read_gb_s",
            "share",
        ];
        assert_eq!(keys(&figures), of_load);
        assert_eq!(figures["cold"], !more.is_empty());
        // The bundled model's file.
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/yi-nano/model.safetensors");
        assert_eq!(figures["bytes"], std::fs::metadata(file).expect("the bundled model").len());
    }
    let empty = tempfile::tempdir().expect("a folder");
    let path = empty.path().to_str().expect("UTF-8");
    PHALANX.run(["bench", "load", "--model", path]).failure(&[path, "safetensors"]);
}

#[test]
fn bench_start_waits_until_it_serves_and_leaves_nothing() {
    let ended = PHALANX.run(["bench", "start", "--runs", "2", "--json", "--workers", "2", "--threads", "1"]);
    let figures = json(&ended.success());
    assert_finite("figures", &figures);
    let of_start = [
        "options",
        "cold",
        "first_seconds",
        "later_seconds",
        "stages",
        "loading",
        "first_answer",
        "second_answer",
    ];
    assert_eq!(keys(&figures), of_start);
    assert_eq!(figures["options"], json(r#"["--workers", "2", "--threads", "1"]"#));
    let stages = figures["stages"].as_array().expect("an array");
    let names: Vec<_> = stages.iter().map(|stage| stage["name"].as_str().expect("a name")).collect();
    let in_order = ["worker started", "device opened", "joined", "connected", "weights loaded", "serving"];
    assert_eq!(names, in_order);
    let sum: f64 = stages.iter().map(|stage| stage["first_seconds"].as_f64().expect("a number")).sum();
    assert!((sum - figures["first_seconds"].as_f64().expect("a number")).abs() < 1e-9);
    assert_eq!(keys(&figures["loading"]), ["bytes", "read_seconds", "load_gb_s", "read_gb_s", "share"]);
    let told = PHALANX.run(["bench", "start", "--runs", "1", "--cold", "--workers", "1"]).success();
    assert!(names.iter().all(|name| told.contains(name)) && told.contains("from the disk"), "{told}");
    PHALANX.run(["bench", "start", "--model", "/nowhere"]).failure(&["before it served"]);
    PHALANX.run(["bench", "start", "--workers", "1", "--json"]).failure(&["options of serve", "'--json'"]);
}
