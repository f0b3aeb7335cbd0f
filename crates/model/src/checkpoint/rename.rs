//! Renaming a checkpoint's tensors into the other naming: new headers, the same data bit for bit.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::error::CheckpointError;
use super::output::Output;
use super::weights::{INDEX, WeightFile, WeightFiles};
use crate::config::{default_rope_theta, read_json};
use crate::names::{Naming, Tensor};

/// The publisher's code for transformers, which `auto_map` refers to.
const PUBLISHERS_CODE: [&str; 2] = ["configuration_yi.py", "modeling_yi.py"];

/// Copies a model directory to `out` with the tensors named `to`, and returns how many names changed.
///
/// The tensors keep their order and their bytes, whatever they are, and the weight files their
/// `__metadata__`; every other file and folder is kept as it is. `config.json` gets the `architectures` and
/// `model_type` of the naming. Its `auto_map` refers to the publisher's code, which knows Yi's names alone: it
/// is dropped with them, and comes back with them where that code lies in the directory. A folder `.git` is
/// left out: its LFS objects are a second copy of the old weights.
///
/// `out` must not exist, or be empty, and its parent must exist; it appears only once it is whole. Works in
/// pieces of a few MiB, and asks of the config only that it is JSON.
pub fn rename(dir: &Path, to: Naming, out: &Path, progress: &ProgressBar) -> Result<usize, CheckpointError> {
    let weights = WeightFiles::open(dir)?;
    weights.naming()?;
    let tensors = weights.files.iter().flat_map(|file| &file.header.tensors);
    let changed = tensors.filter(|tensor| new_name(&tensor.name, to).is_some()).count();
    let contents = Contents::list(dir)?;
    let output = Output::create(out, Some(dir))?;
    progress.set_length(contents.bytes);
    for folder in &contents.folders {
        output.create_folder(folder)?;
    }
    for file in &contents.files {
        let source = dir.join(file);
        if let Some(weights) = weights.files.iter().find(|weights| Path::new(&weights.name) == file) {
            copy_weights(weights, to, &output, progress)?;
        } else if file == Path::new(INDEX) && changed > 0 {
            output.write_json(file, &renamed_index(read_json(&source)?, to))?;
        } else if file == Path::new("config.json") {
            let mut config = read_json(&source)?;
            if retarget(&mut config, to, dir) {
                output.write_json(file, &config)?;
            } else {
                output.copy(file, &[], &source, 0, progress)?;
            }
        } else {
            if file.extension().is_some_and(|extension| extension == "bin") {
                tracing::warn!(file = %file.display(), "copied as it is: only safetensors files are renamed");
            }
            output.copy(file, &[], &source, 0, progress)?;
        }
    }
    output.finish()?;
    progress.finish();
    Ok(changed)
}

/// Makes a config name the class that goes with a naming; `code` is where the publisher's code may lie.
/// Returns whether anything had to change.
pub(super) fn retarget(config: &mut Map<String, Value>, naming: Naming, code: &Path) -> bool {
    let architectures = json!([naming.architecture()]);
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if config.get("architectures") == Some(&architectures)
        && model_type.eq_ignore_ascii_case(naming.model_type())
    {
        return false;
    }
    // The two classes have different defaults.
    let theta = default_rope_theta(model_type);
    if ["rope_theta", "rope_parameters"].iter().all(|key| config.get(*key).is_none_or(Value::is_null)) {
        config.insert("rope_theta".to_owned(), theta.into());
    }
    config.insert("architectures".to_owned(), architectures);
    config.insert("model_type".to_owned(), naming.model_type().into());
    config.shift_remove("auto_map");
    if naming == Naming::Yi && PUBLISHERS_CODE.iter().all(|file| code.join(file).exists()) {
        let auto_map = json!({
            "AutoConfig": "configuration_yi.YiConfig",
            "AutoModel": "modeling_yi.YiModel",
            "AutoModelForCausalLM": "modeling_yi.YiForCausalLM",
        });
        config.insert("auto_map".to_owned(), auto_map);
    }
    true
}

/// The name of a tensor in the wanted naming, where it is another.
fn new_name(name: &str, to: Naming) -> Option<String> {
    match Tensor::parse(name) {
        Some((tensor, Some(told))) if told != to => Some(tensor.name(to)),
        _ => None,
    }
}

fn copy_weights(
    weights: &WeightFile,
    to: Naming,
    output: &Output,
    progress: &ProgressBar,
) -> Result<(), CheckpointError> {
    let mut header = weights.header.clone();
    let mut changed = false;
    for tensor in &mut header.tensors {
        if let Some(name) = new_name(&tensor.name, to) {
            tensor.name = name;
            changed = true;
        }
    }
    if !changed {
        return output.copy(&weights.name, &[], &weights.path, 0, progress);
    }
    output.copy(&weights.name, &header.encode(), &weights.path, header.data_start, progress)
}

fn renamed_index(mut index: Map<String, Value>, to: Naming) -> Map<String, Value> {
    if let Some(Value::Object(weight_map)) = index.get_mut("weight_map") {
        *weight_map = std::mem::take(weight_map)
            .into_iter()
            .map(|(tensor, file)| (new_name(&tensor, to).unwrap_or(tensor), file))
            .collect();
    }
    index
}

/// What a model directory holds, by path inside it; a folder comes before what is in it.
#[derive(Default)]
struct Contents {
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
    bytes: u64,
}

impl Contents {
    fn list(dir: &Path) -> Result<Contents, CheckpointError> {
        let mut contents = Contents::default();
        contents.add(dir, Path::new(""))?;
        Ok(contents)
    }

    fn add(&mut self, dir: &Path, relative: &Path) -> Result<(), CheckpointError> {
        let folder = dir.join(relative);
        let entries = fs::read_dir(&folder).map_err(|source| CheckpointError::io(&folder, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| CheckpointError::io(&folder, source))?;
            let path = entry.path();
            let io = |source| CheckpointError::io(&path, source);
            let inside = relative.join(entry.file_name());
            // Links to files are followed (the Hugging Face cache is made of them); links to folders could
            // lead anywhere.
            let target = fs::metadata(&path).map_err(io)?;
            if target.is_file() {
                self.bytes += target.len();
                self.files.push(inside);
            } else if entry.file_type().map_err(io)?.is_dir() {
                if inside != Path::new(".git") {
                    self.folders.push(inside.clone());
                    self.add(dir, &inside)?;
                }
            } else {
                return Err(io(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither a file nor a folder: take it away",
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{Model, open, parts, tiny};
    use crate::config::Config;

    /// A checkpoint in several files with all that comes with one.
    fn published() -> Model {
        let model = Model::sharded(tiny());
        model.edit_json("config.json", |config| {
            config["auto_map"] = json!({
                "AutoConfig": "configuration_yi.YiConfig",
                "AutoModel": "modeling_yi.YiModel",
                "AutoModelForCausalLM": "modeling_yi.YiForCausalLM",
            });
        });
        model.edit_weights("model-00001-of-00003.safetensors", |header, data| {
            let range = [data.len(), data.len() + 3];
            data.extend([7; 3]);
            header.insert(
                "model.layers.0.extra".to_owned(),
                json!({"dtype": "U8", "shape": [3], "data_offsets": range}),
            );
        });
        for file in PUBLISHERS_CODE.into_iter().chain(["LICENSE", "tokenizer.model"]) {
            fs::write(model.file(file), [file.as_bytes(), &[0, 255]].concat()).unwrap();
        }
        fs::create_dir_all(model.file("docs/empty")).unwrap();
        fs::write(model.file("docs/note"), "note").unwrap();
        fs::create_dir(model.file(".git")).unwrap();
        model
    }

    fn run(model: &Model, from: &Path, to: Naming, out: &str) -> Result<usize, CheckpointError> {
        let out = model.beside(out);
        let changed = rename(from, to, &out, &ProgressBar::hidden());
        assert!(!model.beside(&format!(".{}.partial", out.file_name().unwrap().display())).exists());
        changed
    }

    #[test]
    fn there_and_back_is_the_same_bit_for_bit() {
        let model = published();
        assert_eq!(run(&model, &model.path(), Naming::Llama, "there").unwrap(), 4);
        assert_eq!(run(&model, &model.beside("there"), Naming::Yi, "back").unwrap(), 4);
        let (from, there, back) = (model.path(), model.beside("there"), model.beside("back"));
        let contents = Contents::list(&from).unwrap();
        for file in &contents.files {
            let [a, b] = [&from, &back].map(|dir| dir.join(file));
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("safetensors") => {
                    let (there_header, there_data) = parts(&there.join(file));
                    let (header, data) = parts(&a);
                    assert!(data == there_data && header.len() == there_header.len(), "{file:?}");
                    let values = |header: &Map<String, Value>| header.values().cloned().collect::<Vec<_>>();
                    assert_eq!(values(&header), values(&there_header));
                    assert!(parts(&b) == (header, data), "{file:?}");
                }
                Some("json") => assert_eq!(read_json(&a).unwrap(), read_json(&b).unwrap()),
                _ => assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap()),
            }
        }
        assert!(back.join("docs/empty").is_dir() && !there.join(".git").exists());
        assert_eq!(open(&there).unwrap().naming(), Naming::Llama);
        assert_eq!(open(&back).unwrap().naming(), Naming::Yi);
        let config = read_json(&there.join("config.json")).unwrap();
        assert_eq!((&config["model_type"], config.get("auto_map")), (&json!("llama"), None));
        let index = fs::read_to_string(there.join(INDEX)).unwrap();
        assert!(index.contains("input_layernorm") && !index.contains("ln1"), "{index}");
    }

    #[test]
    fn the_same_naming_is_a_copy() {
        let model = published();
        assert_eq!(run(&model, &model.path(), Naming::Yi, "copy").unwrap(), 0);
        let contents = Contents::list(&model.path()).unwrap();
        for file in contents.files {
            let [a, b] = [model.path(), model.beside("copy")].map(|dir| fs::read(dir.join(&file)).unwrap());
            assert!(a == b, "{file:?}");
        }
    }

    #[test]
    fn what_cannot_be_served_can_be_renamed() {
        let model = Model::new(tiny());
        model.edit_json("config.json", |config| config["rope_scaling"] = json!({"type": "dynamic"}));
        model.edit_weights("model.safetensors", |header, _| {
            header["lm_head.weight"]["dtype"] = json!("I16");
        });
        assert_eq!(run(&model, &model.path(), Naming::Llama, "out").unwrap(), 4);
        fs::remove_file(model.file("config.json")).unwrap();
        assert_eq!(run(&model, &model.path(), Naming::Llama, "out2").unwrap(), 4);
    }

    #[test]
    fn a_base_frequency_by_default_stays_the_same() {
        let model = Model::new(tiny());
        model.edit_json("config.json", |config| config["rope_theta"] = Value::Null);
        run(&model, &model.path(), Naming::Llama, "out").unwrap();
        let theta = |dir: &Path| Config::load(dir).unwrap().rope_theta;
        assert_eq!((theta(&model.path()), theta(&model.beside("out"))), (5e6, 5e6));
    }

    #[test]
    fn a_link_to_a_file_is_followed_and_one_to_a_folder_refused() {
        let model = Model::new(tiny());
        let blob = model.beside("blob");
        fs::rename(model.file("model.safetensors"), &blob).unwrap();
        std::os::unix::fs::symlink(&blob, model.file("model.safetensors")).unwrap();
        assert_eq!(run(&model, &model.path(), Naming::Llama, "out").unwrap(), 4);
        std::os::unix::fs::symlink("..", model.file("loop")).unwrap();
        let message = run(&model, &model.path(), Naming::Llama, "out2").unwrap_err().to_string();
        assert!(message.contains("loop: neither a file nor a folder"), "{message}");
    }

    #[test]
    fn places_that_are_not_free_are_refused() {
        let model = Model::new(tiny());
        let refused = |out: &str| run(&model, &model.path(), Naming::Llama, out).unwrap_err().to_string();
        assert!(refused("model").contains("model: lies in the checkpoint"), "{}", refused("model"));
        assert!(refused("model/new").contains("model/new: lies in the checkpoint"));
        assert!(refused("nowhere/new").contains("nowhere: "));
        fs::create_dir_all(model.beside("full/folder")).unwrap();
        assert!(refused("full").contains("full: exists and is not empty"));
        fs::create_dir(model.beside(".cut.partial")).unwrap();
        let message =
            rename(&model.path(), Naming::Llama, &model.beside("cut"), &ProgressBar::hidden()).unwrap_err();
        assert!(message.to_string().contains(".cut.partial: left by an interrupted run"), "{message}");
        fs::create_dir(model.beside("empty")).unwrap();
        assert_eq!(run(&model, &model.path(), Naming::Llama, "empty").unwrap(), 4);
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let model = Model::new(tiny());
        fs::write(model.file("config.json"), "{").unwrap();
        assert!(
            run(&model, &model.path(), Naming::Llama, "out").unwrap_err().to_string().contains("config.json")
        );
        assert!(!model.beside("out").exists());
    }
}
