//! Tests of opening and reading a checkpoint.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::testing::{Model, open, tiny};
use super::*;
use crate::names::LayerTensor;

const EMBEDDING: &str = "model.embed_tokens.weight";
const LN1: &str = "model.layers.0.ln1.weight";
const Q: &str = "model.layers.1.self_attn.q_proj.weight";
const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn a_good_checkpoint_opens_in_one_file_in_several_and_in_one_of_any_name() {
    for model in [Model::new(tiny()), Model::sharded(tiny())] {
        let checkpoint = model.open().unwrap();
        assert_eq!(checkpoint.naming(), Naming::Yi);
        assert_eq!(checkpoint.shape(Tensor::Norm), [1, 12]);
        assert_eq!(checkpoint.shape(Tensor::Layer(1, LayerTensor::Down)), [12, 22]);
        assert_eq!(checkpoint.dtype(Tensor::Head).unwrap(), SourceType::Bf16);
    }
    let model = Model::new(tiny());
    fs::rename(model.file(FILE), model.file("yi.safetensors")).unwrap();
    model.open().unwrap();
}

#[test]
fn the_bundled_and_the_golden_models_open() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for name in ["models/yi-nano", "tests/golden/gqa7"] {
        assert_eq!(open(&root.join(name)).unwrap().naming(), Naming::Yi, "{name}");
    }
}

#[test]
fn the_config_does_not_decide_the_naming() {
    let model = Model::new(tiny());
    model.edit_json("config.json", |config| config["architectures"] = json!(["LlamaForCausalLM"]));
    assert_eq!(model.open().unwrap().naming(), Naming::Yi);
}

#[test]
fn other_tensors_are_ignored() {
    let model = Model::new(tiny());
    model.edit_weights(FILE, |header, data| {
        let (start, name) = (data.len(), "model.layers.0.self_attn.rotary_emb.inv_freq");
        data.extend([0; 8]);
        header.insert(
            name.to_owned(),
            json!({"dtype": "F64", "shape": [1], "data_offsets": [start, start + 8]}),
        );
    });
    model.open().unwrap();
}

#[test]
fn a_tied_head_is_the_embedding() {
    let mut config = tiny();
    config["tie_word_embeddings"] = json!(true);
    let model = Model::new(config);
    let checkpoint = model.open().unwrap();
    let read = |tensor| checkpoint.read(tensor, 3..5, 0..12).unwrap();
    assert_eq!(read(Tensor::Head), read(Tensor::Embedding));

    // With a head in the file, it is still the embedding.
    let model = Model::new(tiny());
    model.edit_json("config.json", |config| config["tie_word_embeddings"] = json!(true));
    let checkpoint = model.open().unwrap();
    let read = |tensor| checkpoint.read(tensor, 3..5, 0..12).unwrap();
    assert_eq!(read(Tensor::Head), read(Tensor::Embedding));
}

/// How to damage a checkpoint, and what the complaint must contain.
type Damage<'a> = (&'a dyn Fn(&Model), &'a [&'a str]);

/// Renames a tensor in the header.
fn rename_entry(model: &Model, from: &str, to: &str) {
    model.edit_weights(FILE, |header, _| {
        let entry = header.shift_remove(from).unwrap();
        header.insert(to.to_owned(), entry);
    });
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let damages: [Damage; 8] = [
        (&|model| rename_entry(model, Q, "other"), &["model: ", Q, "missing"]),
        (&|model| rename_entry(model, "lm_head.weight", "other"), &["lm_head.weight", "tie_word_embeddings"]),
        (
            &|model| rename_entry(model, Q, "model.layers.2.self_attn.q_proj.weight"),
            &[FILE, "layers.2", "(2)"],
        ),
        (
            &|model| rename_entry(model, LN1, "model.layers.0.input_layernorm.weight"),
            &["model.layers.0.input_layernorm.weight", "model.layers.0.ln2.weight", "two namings"],
        ),
        (
            &|model| model.edit_weights(FILE, |header, _| header[Q]["shape"] = json!([12, 24])),
            &[FILE, Q, "[12, 24], expected [24, 12]"],
        ),
        (
            &|model| model.edit_weights(FILE, |header, _| header[LN1]["shape"] = json!([1, 12])),
            &[FILE, LN1, "[1, 12], expected [12]"],
        ),
        (
            &|model| model.edit_weights(FILE, |header, _| header[Q]["dtype"] = json!("I16")),
            &[FILE, Q, "I16, expected F32, F16 or BF16"],
        ),
        (
            &|model| model.edit_json("config.json", |config| config["vocab_size"] = json!(18)),
            &[FILE, EMBEDDING, "[17, 12], expected [18, 12]"],
        ),
    ];
    for (damage, expected) in damages {
        let model = Model::new(tiny());
        damage(&model);
        let message = model.complaint();
        assert!(expected.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn files_that_are_not_there_or_not_whole_are_named() {
    let whole = fs::read(Model::new(tiny()).file(FILE)).unwrap();
    let short = whole.len() - 1;
    let cases: [(&[u8], String); 2] = [
        (&whole[..short], format!("{} bytes expected, {short} found", whole.len())),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "Git LFS pointer".to_owned(),
        ),
    ];
    for (content, expected) in cases {
        let model = Model::new(tiny());
        fs::write(model.file(FILE), content).unwrap();
        let message = model.complaint();
        assert!(message.contains(FILE) && message.contains(&expected), "{message}");
    }
    let model = Model::new(tiny());
    fs::rename(model.file(FILE), model.file("a.safetensors")).unwrap();
    fs::copy(model.file("a.safetensors"), model.file("b.safetensors")).unwrap();
    assert!(model.complaint().contains("a.safetensors, b.safetensors"), "{}", model.complaint());
    fs::remove_file(model.file("a.safetensors")).unwrap();
    fs::rename(model.file("b.safetensors"), model.file("pytorch_model.bin")).unwrap();
    assert!(model.complaint().contains("convert it to safetensors"), "{}", model.complaint());
    fs::remove_file(model.file("pytorch_model.bin")).unwrap();
    assert!(model.complaint().contains("no weights"), "{}", model.complaint());
    fs::create_dir(model.file(FILE)).unwrap();
    assert!(model.complaint().contains("not a regular file"), "{}", model.complaint());
}

/// Changes the index's map.
fn edit_map(model: &Model, change: impl FnOnce(&mut Value)) {
    model.edit_json(INDEX, |index| change(&mut index["weight_map"]));
}

#[test]
fn an_index_that_lies_is_refused() {
    let (first, outside) = ("model-00001-of-00003.safetensors", "../model/model-00001-of-00003.safetensors");
    let cases: [Damage; 9] = [
        (
            &|model| edit_map(model, |map| map[Q] = json!("gone.safetensors")),
            &["gone.safetensors", "not there"],
        ),
        (&|model| edit_map(model, |map| map["ghost"] = json!(first)), &["ghost", first]),
        (
            &|model| edit_map(model, |map| map[EMBEDDING] = map["lm_head.weight"].clone()),
            &[EMBEDDING, "but it is not"],
        ),
        (&|model| edit_map(model, |map| map[Q] = json!(outside)), &[Q, outside, "same folder"]),
        (&|model| edit_map(model, |map| map[Q] = json!("/etc/passwd")), &[Q, "/etc/passwd", "same folder"]),
        (&|model| edit_map(model, |map| map[Q] = json!("..")), &[Q, "same folder"]),
        (&|model| edit_map(model, |map| map[Q] = json!(7)), &[Q, "7"]),
        (&|model| edit_map(model, |map| *map = json!([])), &["weight_map"]),
        (&|model| edit_map(model, |map| *map = json!({})), &["weight_map is empty"]),
    ];
    for (damage, expected) in cases {
        let model = Model::sharded(tiny());
        assert!(model.file(first).exists());
        damage(&model);
        let message = model.complaint();
        assert!(message.contains(INDEX) && expected.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let model = Model::sharded(tiny());
    fs::copy(model.file("model-00001-of-00003.safetensors"), model.file("z.safetensors")).unwrap();
    model.edit_json(INDEX, |index| index["weight_map"]["ghost"] = json!("z.safetensors"));
    let message = model.complaint();
    let parts = [EMBEDDING, "model-00001-of-00003.safetensors", "z.safetensors", "two files"];
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
}

#[test]
fn slices_outside_a_tensor_and_tensors_outside_the_model_are_errors() {
    let checkpoint = Model::new(tiny()).open().unwrap();
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    for (rows, cols) in [(0..18, 0..1), (0..1, 0..13), (3..2, 0..1), (0..1, 3..2)] {
        let message = checkpoint.read(Tensor::Head, rows, cols).unwrap_err().to_string();
        assert!(message.contains("lm_head.weight of shape [17, 12]"), "{message}");
    }
    let message = checkpoint.dtype(Tensor::Layer(2, LayerTensor::FfnNorm)).unwrap_err().to_string();
    assert!(message.contains("model.layers.2.ln2.weight"), "{message}");
}

#[test]
fn a_file_cut_short_after_opening_is_an_error() {
    let model = Model::new(tiny());
    let checkpoint = model.open().unwrap();
    fs::OpenOptions::new().write(true).open(model.file(FILE)).unwrap().set_len(100).unwrap();
    let message = checkpoint.read(Tensor::Head, 0..17, 0..12).unwrap_err().to_string();
    assert!(message.contains(FILE), "{message}");
}

/// Rows so long that the gaps between slices are not read.
#[test]
fn wide_rows_read_the_same() {
    let mut config = tiny();
    config["intermediate_size"] = json!(40_000);
    let model = Model::new(config);
    let checkpoint = model.open().unwrap();
    let down = Tensor::Layer(0, LayerTensor::Down);
    let whole = checkpoint.read(down, 0..12, 0..40_000).unwrap();
    let runs = [100..105, 7..9];
    let expected = runs.clone().map(|run| {
        (2..12)
            .flat_map(|row| whole[2 * (row * 40_000 + run.start)..2 * (row * 40_000 + run.end)].to_vec())
            .collect()
    });
    let slices: [Vec<u8>; 2] = expected;
    assert_eq!(checkpoint.read_columns(down, 2..12, &runs).unwrap(), slices);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every slice has the bytes that the format's own library sees.
    #[test]
    fn slices_are_the_tensors_bytes(
        rows in (0usize..=12, 0usize..=12), runs in prop::collection::vec((0usize..=22, 0usize..=22), 0..4),
    ) {
        let model = Model::new(tiny());
        let bytes = fs::read(model.file(FILE)).unwrap();
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        let data = theirs.tensor("model.layers.1.mlp.down_proj.weight").unwrap().data();
        let range = |(a, b): (usize, usize)| a.min(b)..a.max(b);
        let (rows, runs): (_, Vec<_>) = (range(rows), runs.into_iter().map(range).collect());
        let down = Tensor::Layer(1, LayerTensor::Down);
        let slices = model.open().unwrap().read_columns(down, rows.clone(), &runs).unwrap();
        prop_assert_eq!(slices.len(), runs.len());
        for (slice, run) in slices.iter().zip(&runs) {
            let row = |row: usize| &data[2 * (22 * row + run.start)..2 * (22 * row + run.end)];
            let expected: Vec<u8> = rows.clone().flat_map(|r| row(r).to_vec()).collect();
            prop_assert_eq!(slice, &expected);
        }
    }

    /// Whatever three bytes of a checkpoint's files are damaged, it opens or is refused.
    #[test]
    fn damaged_files_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), file in 0usize..3,
    ) {
        let model = Model::sharded(tiny());
        let path = model.file(["model-00001-of-00003.safetensors", INDEX, "config.json"][file]);
        let mut bytes = fs::read(&path).unwrap();
        for (at, byte) in damage {
            // Headers are in front: most of the damage goes there.
            let at = at.index(bytes.len().min(900));
            bytes[at] = byte;
        }
        fs::write(&path, bytes).unwrap();
        let _ = model.open();
    }
}
