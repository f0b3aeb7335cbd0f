//! Bad input through the program: one clear message that names the file, tensor or flag, an exit code, no process left.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use phalanx_tests::process::{Ended, Program};
use serde_json::{Value, json};
use tempfile::TempDir;

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));

/// A copy of a checkpoint, to be broken.
struct Broken {
    folder: TempDir,
}

impl Broken {
    /// One of `tests/golden` (no tokenizer), or `yi-nano`.
    fn copy(name: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source =
            if name == "yi-nano" { root.join("../models/yi-nano") } else { root.join("golden").join(name) };
        let folder = tempfile::tempdir().expect("a folder");
        for entry in fs::read_dir(source).expect("a checkpoint") {
            let path = entry.expect("an entry").path();
            let file = path.file_name().expect("a name");
            if !file.to_string_lossy().starts_with("golden") {
                fs::copy(&path, folder.path().join(file)).expect("copied");
            }
        }
        Self { folder }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn dir(&self) -> &str {
        self.folder.path().to_str().expect("UTF-8")
    }

    /// Changes a JSON file.
    fn json(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&fs::read(self.path(file)).expect("a file")).expect("JSON");
        change(&mut value);
        fs::write(self.path(file), value.to_string()).expect("written");
    }

    /// Changes the header of a safetensors file and leaves its data.
    fn header(&self, file: &str, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let bytes = fs::read(self.path(file)).expect("a file");
        let (length, rest) = bytes.split_first_chunk().expect("a length");
        let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).expect("a length"));
        let mut header: Value = serde_json::from_slice(header).expect("JSON");
        change(header.as_object_mut().expect("an object"));
        let header = header.to_string();
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
        fs::write(self.path(file), bytes).expect("written");
    }

    fn generate(&self, args: &[&str]) -> Ended {
        generate(self.dir(), args)
    }

    /// Both commands that open a checkpoint refuse it.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        refused(self.dir(), words);
    }
}

fn generate(dir: &str, args: &[&str]) -> Ended {
    PHALANX.run([&["generate", "--model", dir, "--prompt-ids", "1,2"], args].concat())
}

#[track_caller]
fn refused(dir: &str, words: &[&str]) {
    generate(dir, &[]).failure(words);
    PHALANX.run(["checkpoint", "inspect", dir]).failure(words);
}

#[test]
fn a_folder_that_is_missing_or_has_no_config() {
    refused("/nowhere/at/all", &["/nowhere/at/all"]);
    let broken = Broken::copy("gqa7");
    fs::remove_file(broken.path("config.json")).expect("removed");
    broken.refused(&[broken.dir(), "config.json"]);
}

#[test]
fn a_folder_without_weights() {
    let broken = Broken::copy("mha");
    fs::remove_file(broken.path("model.safetensors")).expect("removed");
    broken.refused(&[broken.dir(), "safetensors"]);
    let broken = Broken::copy("gqa7");
    fs::remove_file(broken.path("model-00002-of-00002.safetensors")).expect("removed");
    broken.refused(&[broken.dir(), "model-00002-of-00002.safetensors"]);
}

#[test]
fn a_config_that_is_not_json_or_of_another_architecture() {
    let broken = Broken::copy("gqa7");
    broken.json("config.json", |config| {
        config["architectures"] = json!(["GPT2LMHeadModel"]);
        config["model_type"] = json!("gpt2");
    });
    broken.refused(&["config.json", "GPT2LMHeadModel"]);
    fs::write(broken.path("config.json"), "{ \"architectures\": [").expect("written");
    broken.refused(&["config.json", "JSON"]);
}

#[test]
fn a_config_with_a_false_size() {
    for (key, value) in [
        ("num_attention_heads", json!(13)),
        ("num_key_value_heads", json!(0)),
        ("hidden_size", json!(1u64 << 60)),
        ("vocab_size", json!(-5)),
        ("num_hidden_layers", json!(u64::MAX)),
    ] {
        let broken = Broken::copy("gqa7");
        broken.json("config.json", |config| config[key] = value);
        broken.refused(&["config.json", key]);
    }
}

#[test]
fn a_file_that_was_cut_off() {
    let broken = Broken::copy("mha");
    let bytes = fs::read(broken.path("model.safetensors")).expect("a file");
    for length in [bytes.len() - 1, bytes.len() / 2, 1000, 100, 8, 7, 0] {
        fs::write(broken.path("model.safetensors"), &bytes[..length]).expect("written");
        PHALANX.run(["checkpoint", "inspect", broken.dir()]).failure(&["model.safetensors"]);
    }
    fs::write(broken.path("model.safetensors"), &bytes[..bytes.len() - 1]).expect("written");
    broken.refused(&["model.safetensors", "truncated"]);
}

#[test]
fn a_header_whose_length_lies() {
    let broken = Broken::copy("mha");
    let mut bytes = fs::read(broken.path("model.safetensors")).expect("a file");
    for length in [u64::MAX, 1 << 62, 1 << 40, 0, 3] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(broken.path("model.safetensors"), &bytes).expect("written");
        broken.refused(&["model.safetensors"]);
    }
}

#[test]
fn offsets_that_lie() {
    const NORM: &str = "model.norm.weight";
    for offsets in [json!([0, 1u64 << 40]), json!([u64::MAX - 1, u64::MAX]), json!([64, 0]), json!([0, 1])] {
        let broken = Broken::copy("mha");
        broken.header("model.safetensors", |header| header[NORM]["data_offsets"] = offsets);
        broken.refused(&["model.safetensors", NORM]);
    }
    let broken = Broken::copy("mha");
    let shift = |offset: &Value| json!(offset.as_u64().expect("a number") + (1 << 30));
    broken.header("model.safetensors", |header| {
        let old = header[NORM]["data_offsets"].clone();
        header[NORM]["data_offsets"] = json!([shift(&old[0]), shift(&old[1])]);
    });
    broken.refused(&["model.safetensors"]);
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    let broken = Broken::copy("gqa7");
    broken.json("config.json", |config| config["intermediate_size"] = json!(208));
    broken.refused(&[".safetensors", "mlp.", "208", "200"]);

    let broken = Broken::copy("mha");
    broken.header("model.safetensors", |header| {
        let head = &mut header["lm_head.weight"];
        let (rows, columns) = (head["shape"][0].clone(), head["shape"][1].clone());
        head["shape"] = json!([columns, rows]);
    });
    broken.refused(&["model.safetensors", "lm_head.weight"]);

    let broken = Broken::copy("mha");
    broken.header("model.safetensors", |header| header["lm_head.weight"]["dtype"] = json!("I16"));
    broken.refused(&["model.safetensors", "lm_head.weight", "I16"]);
}

#[test]
fn a_tensor_that_is_absent() {
    let broken = Broken::copy("mha");
    let name = "model.layers.1.self_attn.k_proj.weight";
    broken.header("model.safetensors", |header| {
        let entry = header.remove(name).expect("in the file");
        header.insert("somebody.elses.weight".into(), entry);
    });
    broken.refused(&[broken.dir(), name, "missing"]);
}

#[test]
fn both_namings_at_once() {
    let broken = Broken::copy("mha");
    broken.header("model.safetensors", |header| {
        let find = |text: &str| header.keys().find(|name| name.contains(text)).cloned();
        let (old, new) = match find("layers.1.input_layernorm") {
            Some(llama) => (llama.clone(), llama.replace("input_layernorm", "ln1")),
            None => {
                let yi = find("layers.1.ln1").expect("a norm");
                (yi.clone(), yi.replace("ln1", "input_layernorm"))
            }
        };
        let entry = header.remove(&old).expect("in the file");
        header.insert(new, entry);
    });
    broken.refused(&[broken.dir(), "ln1", "input_layernorm"]);
}

#[test]
fn a_tokenizer_larger_than_the_embedding_or_broken() {
    let broken = Broken::copy("gqa7");
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/yi-nano/tokenizer.json");
    fs::copy(tokenizer, broken.path("tokenizer.json")).expect("copied");
    broken.generate(&[]).failure(&[broken.dir(), "tokenizer", "211"]);
    fs::write(broken.path("tokenizer.json"), "[]").expect("written");
    broken.generate(&[]).failure(&["tokenizer.json"]);
}

#[test]
fn prompts_that_cannot_be() {
    let broken = Broken::copy("gqa7");
    let long = vec!["1"; 40].join(",");
    let args = ["generate", "--model", broken.dir(), "--max-context", "40", "--prompt-ids", &long];
    PHALANX.run(args).failure(&["40 tokens", "context"]);
    let prompt = |ids| PHALANX.run(["generate", "--model", broken.dir(), "--prompt-ids", ids]);
    prompt("1,210,211").failure(&["id 211", "below 211"]);
    prompt("4294967295").failure(&["id 4294967295", "below 211"]);
    broken.generate(&["--max-tokens", "0"]).failure(&["max_tokens"]);
    broken.generate(&["--max-context", "9000"]).failure(&["--max-context", "8192"]);
    broken.generate(&["--max-context", "0"]).failure(&["--max-context"]);
    broken.generate(&["--temperature", "nan"]).failure(&["temperature"]);
    let file = broken.path("no-such-prompt");
    let file = file.to_str().expect("UTF-8");
    PHALANX.run(["generate", "--prompt-file", file]).failure(&["--prompt-file", file]);
}

#[test]
fn arguments_that_are_not_understood() {
    for args in [
        &["--prompt-ids", "1,x"][..],
        &["--prompt-ids", "-1"],
        &["--prompt-ids", "1", "--kv-memory", "much"],
        &["--prompt-ids", "1", "--threads", "0"],
        &["--prompt-ids", "1", "--prompt", "twice"],
    ] {
        let ended = PHALANX.run([&["generate"], args].concat());
        assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
        assert!(ended.stderr.starts_with("error: ") && ended.stderr.contains("--"), "{}", ended.stderr);
    }
}

#[test]
fn widths_and_limits_that_cannot_be() {
    let broken = Broken::copy("gqa7");
    for width in ["0", "3", "1000000"] {
        broken.generate(&["--workers", width]).failure(&["--workers", width, "1 to 2"]);
    }
    broken.generate(&["--kv-memory", "100B"]).failure(&["--kv-memory"]);
    for steps in ["0", "3"] {
        broken.generate(&["--steps-in-flight", steps]).failure(&["--steps-in-flight", steps, "1 to 2"]);
    }
}

#[test]
fn a_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    PHALANX.run(["serve", "--grpc", &address]).failure(&["--grpc", &address]);
    let coordinator = |flag, other| {
        let args = ["coordinator", "--workers", "1", flag, &address, other, "127.0.0.1:0"];
        PHALANX.command(args).env("PHALANX_SECRET", "a secret of the tests").run()
    };
    coordinator("--grpc", "--listen").failure(&["--grpc", &address]);
    coordinator("--listen", "--grpc").failure(&["--listen", &address]);
    let args = ["worker", "--coordinator", "127.0.0.1:1", "--listen", &address];
    PHALANX.command(args).env("PHALANX_SECRET", "a secret of the tests").run().failure(&[&address]);
}

#[test]
fn a_backend_that_cannot_start() {
    let path = "a-path-of-no-cpu";
    let generate = PHALANX.command(["generate", "--prompt-ids", "1,2"]).env("PHALANX_CPU_PATH", path);
    generate.run().failure(&["PHALANX_CPU_PATH", path]);
}

#[test]
fn workers_that_die_at_the_start() {
    // A block does not fit on any worker, which only they find out.
    let broken = Broken::copy("gqa7");
    broken.generate(&["--kv-memory", "1KB", "--workers", "2"]).failure(&["--kv-memory"]);
    let args = ["serve", "--grpc", "127.0.0.1:0", "--model", broken.dir(), "--kv-memory", "1KB"];
    PHALANX.run(args).failure(&["--kv-memory"]);
}

#[test]
fn nobody_at_the_server_s_address() {
    let generate = |address| PHALANX.run(["generate", "--server", address, "--prompt", "x"]);
    generate("127.0.0.1:1").failure(&["127.0.0.1:1"]);
    generate("not an address").failure(&["not an address"]);
}

#[test]
fn a_checkpoint_without_tokenizer_takes_ids_alone() {
    let broken = Broken::copy("gqa7");
    let answer: Value =
        serde_json::from_str(&broken.generate(&["--json", "--ignore-eos", "--max-tokens", "4"]).success())
            .expect("JSON");
    assert_eq!(answer["text"], "");
    assert_eq!(answer["token_ids"].as_array().map(Vec::len), Some(4));
    let text = PHALANX.run(["generate", "--model", broken.dir(), "--prompt", "In the beginning"]);
    text.failure(&["tokenizer"]);
}

#[test]
fn a_tokenizer_of_its_own_model_is_accepted() {
    let whole = Broken::copy("yi-nano");
    assert!(!whole.generate(&["--max-tokens", "4"]).success().is_empty());
}
