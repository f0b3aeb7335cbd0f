//! Tests of opening, reading, inspecting and renaming quantised checkpoints.

use std::fs;

use indicatif::ProgressBar;
use kernels::DType;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::testing::{Model, open};
use crate::checkpoint::{inspect, rename};
use crate::names::{LayerTensor, Naming};

const FILE: &str = "model.safetensors";
const Q: &str = "model.layers.1.self_attn.q_proj";

/// A config of two units that cut groups and words.
fn small(quantization: &Value) -> Value {
    json!({
        "architectures": ["YiForCausalLM"], "model_type": "Yi", "torch_dtype": "bfloat16", "eos_token_id": 2,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 20, "vocab_size": 17, "max_position_embeddings": 64,
        "rope_theta": 5000000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "quantization_config": quantization,
    })
}

fn awq() -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm"})
}

fn gptq() -> Value {
    json!({"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": false, "sym": true})
}

fn all_kinds() -> [Value; 4] {
    let rows = json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": true, "sym": false});
    let second = json!({"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"});
    [awq(), gptq(), rows, second]
}

/// The numbers of a slice, row-major.
fn numbers(checkpoint: &Checkpoint, tensor: Tensor, rows: Range<usize>, cols: Range<usize>) -> Vec<f32> {
    let slices = checkpoint.read_quantized(tensor, slice::from_ref(&rows), cols.clone()).unwrap();
    let size = slices[0].group_size();
    // A size that fits, though not always the largest.
    let size = if cols.start.is_multiple_of(size) { size } else { 1 << cols.start.trailing_zeros().min(5) };
    let bytes = slices[0].unpack(size).block().dequantize(DType::F32).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn the_golden_models_open_and_are_described() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    for (name, expected) in [
        ("awq4", "YiForCausalLM (yi names), awq int4 in groups of 32 and f16\n"),
        ("gptq8", "LlamaForCausalLM (llama names), f16 and gptq int8 in groups of 64\n"),
        ("gptq4", "LlamaForCausalLM (llama names), f16 and gptq_v2 int4 by rows\n"),
    ] {
        let text = inspect(&root.join(name)).unwrap().to_string();
        assert!(text.starts_with(expected), "{text}");
        assert!(text.contains("weights a rank, bf16    quantised "), "{text}");
    }
}

#[test]
fn what_a_rank_holds_is_counted() {
    let mut config = small(&json!({"quant_method": "awq", "bits": 4}));
    for (key, value) in [
        ("hidden_size", 128),
        ("intermediate_size", 512),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
        ("head_dim", 16),
    ] {
        config[key] = json!(value);
    }
    let model = Model::new(config);
    let inspection = inspect(&model.path()).unwrap();
    // q and o, k and v, the FFN; two layers.
    let projections = 2 * (2 * 128 * 128 + 2 * 32 * 128 + 3 * 512 * 128);
    let plain = 2 * (5 * 128 + 2 * 17 * 128);
    let rank = &inspection.widths[0].ranks[0];
    assert_eq!(inspection.parameters, (projections + plain / 2) as u64);
    assert_eq!(rank.weight_bytes, (2 * projections + plain) as u64);
    // Every unit's columns of o_proj begin a group of their own: 64 columns in one of 128.
    let groups = projections / 128 + 2 * 128;
    assert_eq!(rank.quantized_weight_bytes, Some(((projections + groups) / 2 + 2 * groups + plain) as u64));
    assert_eq!(inspection.dtypes["awq int4 in groups of 128"], 14);
}

/// How to damage a checkpoint, and what the complaint must contain.
type Damage<'a> = (&'a Value, &'a dyn Fn(&Model), &'a [&'a str]);

/// Renames a tensor in the header.
fn rename_entry(model: &Model, from: &str, to: &str) {
    model.edit_weights(FILE, |header, _| {
        let entry = header.shift_remove(&format!("{Q}.{from}")).unwrap();
        header.insert(to.to_owned(), entry);
    });
}

/// Replaces a tensor's entry in the header.
fn set(model: &Model, part: &str, key: &str, value: Value) {
    model.edit_weights(FILE, |header, _| header[&format!("{Q}.{part}")][key] = value);
}

/// Adds a bias to the tensors: 80 numbers in half precision, the last of which is `last`.
fn add_bias(model: &Model, last: f32) {
    model.edit_weights(FILE, |header, data| {
        let start = data.len();
        data.resize(start + 158, 0);
        data.extend(f16::from_f32(last).to_le_bytes());
        let entry = json!({"dtype": "F16", "shape": [80], "data_offsets": [start, start + 160]});
        header.insert(format!("{Q}.bias"), entry);
    });
}

/// Sets the first column's group.
fn regroup(model: &Model) {
    model.edit_weights(FILE, |header, data| {
        let start = header[&format!("{Q}.g_idx")]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + 4].copy_from_slice(&1u32.to_le_bytes());
    });
}

#[test]
fn what_does_not_fit_is_named() {
    let (awq, gptq) = (awq(), gptq());
    let damages: [Damage; 13] = [
        (&awq, &|model| rename_entry(model, "qweight", "other"), &["q_proj.qweight", "missing"]),
        (&awq, &|model| rename_entry(model, "qzeros", "other"), &["q_proj.qzeros", "missing"]),
        (&gptq, &|model| rename_entry(model, "scales", "other"), &["q_proj.scales", "missing"]),
        (
            &gptq,
            &|model| {
                rename_entry(model, "g_idx", "other");
                model.edit_json("config.json", |config| {
                    config["quantization_config"]["desc_act"] = json!(true)
                });
            },
            &["q_proj.g_idx", "missing"],
        ),
        (
            &awq,
            &|model| rename_entry(model, "qweight", &format!("{Q}.weight")),
            &[FILE, "q_proj.weight", "is not quantised", "quantization_config"],
        ),
        (
            &awq,
            &|model| model.edit_json("config.json", |config| config["quantization_config"] = Value::Null),
            &[FILE, ".qweight", "is quantised", "no quantization_config"],
        ),
        (
            &awq,
            &|model| rename_entry(model, "qzeros", "model.layers.2.mlp.up_proj.qzeros"),
            &[FILE, "layers.2", "(2)"],
        ),
        (
            &awq,
            &|model| set(model, "qweight", "shape", json!([10, 64])),
            &[FILE, "q_proj.qweight", "[10, 64], expected [64, 10]"],
        ),
        (
            &gptq,
            &|model| {
                model.edit_json("config.json", |config| {
                    config["quantization_config"]["group_size"] = json!(32);
                })
            },
            &[FILE, "qzeros", "has shape [1, 20], expected [2, 20]"],
        ),
        (
            &gptq,
            &|model| set(model, "qweight", "dtype", json!("F32")),
            &[FILE, "q_proj.qweight", "F32, expected I32"],
        ),
        (
            &gptq,
            &|model| set(model, "scales", "dtype", json!("I16")),
            &[FILE, "q_proj.scales", "I16, expected F32, F16 or BF16"],
        ),
        (&gptq, &regroup, &[FILE, "q_proj.g_idx", "desc_act", "not supported"]),
        (&gptq, &|model| add_bias(model, 0.5), &[FILE, "q_proj.bias", "biases are not supported"]),
    ];
    for (quantization, damage, expected) in damages {
        let model = Model::new(small(quantization));
        damage(&model);
        let message = model.complaint();
        assert!(expected.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn a_bias_of_zeros_and_group_indices_in_order_are_nothing() {
    let model = Model::new(small(&gptq()));
    add_bias(&model, 0.0);
    model.open().unwrap();
    let model = Model::new(small(&gptq()));
    rename_entry(&model, "g_idx", "other");
    model.open().unwrap();
}

#[test]
fn quantised_tensors_are_not_read_as_others_and_slices_have_bounds() {
    let checkpoint = Model::new(small(&awq())).open().unwrap();
    let down = Tensor::Layer(0, LayerTensor::Down);
    assert_eq!(checkpoint.shape(down), [64, 96]);
    assert!(checkpoint.dtype(down).is_err() && checkpoint.read(down, 0..1, 0..1).is_err());
    for (rows, cols) in [(0..65, 0..96), (0..64, 0..97), (70..72, 0..1)] {
        let message = checkpoint.read_quantized(down, slice::from_ref(&rows), cols).unwrap_err().to_string();
        assert!(message.contains("model.layers.0.mlp.down_proj.qweight of shape [96, 8]"), "{message}");
    }
    assert!(checkpoint.read_quantized(Tensor::Head, slice::from_ref(&(0..1)), 0..64).is_err());
}

#[test]
fn a_scale_that_is_no_number_is_refused() {
    let model = Model::new(small(&awq()));
    model.edit_weights(FILE, |header, data| {
        let start = header[&format!("{Q}.scales")]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + 2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    });
    let checkpoint = model.open().unwrap();
    let tensor = Tensor::Layer(1, LayerTensor::Q);
    let message =
        checkpoint.read_quantized(tensor, slice::from_ref(&(0..80)), 0..64).unwrap_err().to_string();
    assert!(message.contains(FILE) && message.contains("q_proj.scales has a scale"), "{message}");
}

#[test]
fn a_file_cut_short_after_opening_is_an_error() {
    let model = Model::new(small(&awq()));
    let checkpoint = model.open().unwrap();
    fs::OpenOptions::new().write(true).open(model.file(FILE)).unwrap().set_len(5000).unwrap();
    let down = Tensor::Layer(1, LayerTensor::Down);
    let message = checkpoint.read_quantized(down, slice::from_ref(&(0..64)), 0..96).unwrap_err().to_string();
    assert!(message.contains(FILE), "{message}");
}

#[test]
fn renaming_passes_quantised_tensors_on() {
    for quantization in all_kinds() {
        let model = Model::new(small(&quantization));
        let out = model.beside("renamed");
        let changed = rename(&model.path(), Naming::Llama, &out, &ProgressBar::hidden()).unwrap();
        assert_eq!(changed, 4);
        let (old, new) = (model.open().unwrap(), open(&out).unwrap());
        assert_eq!(new.naming(), Naming::Llama);
        for tensor in Tensor::all(2, false).filter(|tensor| tensor.is_projection()) {
            let [rows, cols] = old.shape(tensor);
            assert_eq!(
                numbers(&old, tensor, 0..rows, 0..cols),
                numbers(&new, tensor, 0..rows, 0..cols),
                "{tensor:?}"
            );
        }
    }
}

/// Random values of a synthesized model have the size that keeps activations.
#[test]
fn synthesized_weights_keep_activations() {
    for quantization in all_kinds() {
        let checkpoint = Model::new(small(&quantization)).open().unwrap();
        let down = numbers(&checkpoint, Tensor::Layer(1, LayerTensor::Down), 0..64, 0..96);
        let square = down.iter().map(|x| x * x).sum::<f32>() / down.len() as f32;
        assert!(((square * 96.0).sqrt() - 1.0).abs() < 0.05, "{quantization}: {square}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every slice has the numbers that the whole matrix has there, wherever it cuts words and groups.
    #[test]
    fn slices_are_parts_of_the_matrix(
        kind in 0usize..4, rows in (0usize..=80, 0usize..=80), runs in (0usize..=80, 0usize..=80),
        cols in (0usize..=64, 0usize..=64), column_major: bool,
    ) {
        let model = Model::new(small(&all_kinds()[kind]));
        let checkpoint = model.open().unwrap();
        // [80, 64], or its opposite.
        let (tensor, width) = match column_major {
            false => (Tensor::Layer(1, LayerTensor::Q), 64),
            true => (Tensor::Layer(1, LayerTensor::O), 80),
        };
        let [total, _] = checkpoint.shape(tensor);
        let whole = numbers(&checkpoint, tensor, 0..total, 0..width);
        let range = |(a, b): (usize, usize), most: usize| a.min(b).min(most)..a.max(b).min(most);
        let cols = range(cols, width);
        for rows in [range(rows, total), range(runs, total)] {
            let found = numbers(&checkpoint, tensor, rows.clone(), cols.clone());
            let expected: Vec<f32> = rows
                .flat_map(|row| whole[row * width + cols.start..row * width + cols.end].to_vec())
                .collect();
            prop_assert_eq!(found, expected);
        }
    }

    /// Several runs in one pass are those one by one.
    #[test]
    fn runs_are_read_in_one_pass(kind in 0usize..4, cuts in prop::collection::vec(0usize..=80, 2..5)) {
        let checkpoint = Model::new(small(&all_kinds()[kind])).open().unwrap();
        let q = Tensor::Layer(0, LayerTensor::Q);
        let runs: Vec<_> = cuts.windows(2).map(|pair| pair[0].min(pair[1])..pair[0].max(pair[1])).collect();
        let together = checkpoint.read_quantized(q, &runs, 0..64).unwrap();
        for (run, slice) in runs.iter().zip(together) {
            let alone = checkpoint.read_quantized(q, slice::from_ref(run), 0..64).unwrap();
            prop_assert_eq!(slice.unpack(32), alone[0].unpack(32));
        }
    }

    /// Whatever three bytes of the header are damaged, the checkpoint opens or is refused.
    #[test]
    fn damaged_files_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), kind in 0usize..4,
    ) {
        let model = Model::new(small(&all_kinds()[kind]));
        let mut bytes = fs::read(model.file(FILE)).unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len().min(4000));
            bytes[at] = byte;
        }
        fs::write(model.file(FILE), bytes).unwrap();
        let _ = model.open();
    }
}
