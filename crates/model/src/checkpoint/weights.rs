//! The weight files of a model directory: which they are, and what their headers say together.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::error::CheckpointError;
use super::header::Header;
use crate::config::read_json;
use crate::names::{Naming, Tensor};

/// The index of a checkpoint of several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The name of a checkpoint of one file.
pub(super) const SINGLE: &str = "model.safetensors";

/// The files of a checkpoint, each with its header.
#[derive(Debug)]
pub(super) struct WeightFiles {
    pub(super) dir: PathBuf,
    /// In the order of their names.
    pub(super) files: Vec<WeightFile>,
}

/// One open file.
#[derive(Debug)]
pub(super) struct WeightFile {
    /// Inside the model directory.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) header: Header,
}

impl WeightFiles {
    /// Finds and opens the files; checks that the index tells the truth and that no tensor comes twice.
    pub(super) fn open(dir: &Path) -> Result<WeightFiles, CheckpointError> {
        let index = dir.join(INDEX);
        if !index.exists() {
            let file = WeightFile::open(dir, &only_file(dir)?)?;
            return Ok(WeightFiles { dir: dir.to_owned(), files: vec![file] });
        }
        let wrong = |detail| CheckpointError::Index { path: index.clone(), detail };
        let json = read_json(&index)?;
        let weight_map = weight_map(&json).map_err(wrong)?;
        let names: BTreeSet<&str> = weight_map.iter().map(|(_, file)| *file).collect();
        for &name in &names {
            if !dir.join(name).exists() {
                return Err(wrong(format!(
                    "weight_map names the file {name}, which is not there: download it again"
                )));
            }
        }
        let files =
            names.into_iter().map(|name| WeightFile::open(dir, name)).collect::<Result<Vec<_>, _>>()?;
        let mut places: HashMap<&str, &WeightFile> = HashMap::new();
        for file in &files {
            for tensor in &file.header.tensors {
                if let Some(first) = places.insert(&tensor.name, file) {
                    return Err(CheckpointError::Duplicate {
                        tensor: tensor.name.clone(),
                        first: first.path.clone(),
                        second: file.path.clone(),
                    });
                }
            }
        }
        for (tensor, file) in weight_map {
            if places.get(tensor).is_none_or(|place| place.name != file) {
                return Err(wrong(format!(
                    "weight_map says that tensor {tensor} is in {file}, but it is not"
                )));
            }
        }
        Ok(WeightFiles { dir: dir.to_owned(), files })
    }

    /// The naming that the names of the tensors tell, if any of them does.
    pub(super) fn naming(&self) -> Result<Option<Naming>, CheckpointError> {
        let named = |wanted| {
            let names = self.files.iter().flat_map(|file| &file.header.tensors).map(|tensor| &tensor.name);
            names
                .into_iter()
                .find(|name| matches!(Tensor::parse(name), Some((_, told)) if told == Some(wanted)))
        };
        match (named(Naming::Yi), named(Naming::Llama)) {
            (Some(yi), Some(llama)) => Err(CheckpointError::TwoNamings {
                dir: self.dir.clone(),
                yi: yi.clone(),
                llama: llama.clone(),
            }),
            (Some(_), None) => Ok(Some(Naming::Yi)),
            (None, Some(_)) => Ok(Some(Naming::Llama)),
            (None, None) => Ok(None),
        }
    }
}

impl WeightFile {
    fn open(dir: &Path, name: &str) -> Result<WeightFile, CheckpointError> {
        let path = dir.join(name);
        let file = File::open(&path).map_err(|source| CheckpointError::io(&path, source))?;
        let header = Header::read(&file, &path)?;
        Ok(WeightFile { name: name.to_owned(), path, file, header })
    }
}

/// Tensor and file of every entry of an index. A file is a plain name, so that none outside the directory is
/// opened.
fn weight_map(index: &Map<String, Value>) -> Result<Vec<(&str, &str)>, String> {
    let map = index.get("weight_map").and_then(Value::as_object).ok_or("no object weight_map")?;
    if map.is_empty() {
        return Err("weight_map is empty".to_owned());
    }
    map.iter()
        .map(|(tensor, file)| {
            let file = file
                .as_str()
                .ok_or_else(|| format!("weight_map has {file} for tensor {tensor}, not a file's name"))?;
            let mut parts = Path::new(file).components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(name)), None) if name == file => Ok((tensor.as_str(), file)),
                _ => Err(format!(
                    "weight_map has {file:?} for tensor {tensor}, not the name of a file in the same folder"
                )),
            }
        })
        .collect()
}

/// The weights of a checkpoint without an index.
fn only_file(dir: &Path) -> Result<String, CheckpointError> {
    if dir.join(SINGLE).exists() {
        return Ok(SINGLE.to_owned());
    }
    let io = |source| CheckpointError::io(dir, source);
    let mut found = Vec::new();
    let mut pytorch = false;
    for entry in fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let Some(name) = name.to_str() else { continue };
        pytorch |= name.starts_with("pytorch_model") && name.ends_with(".bin");
        if name.ends_with(".safetensors") {
            found.push(name.to_owned());
        }
    }
    found.sort();
    let detail = match (found.len(), pytorch) {
        (1, _) => return Ok(found.swap_remove(0)),
        (0, true) => {
            "no *.safetensors file, only PyTorch's pytorch_model*.bin: convert it to safetensors".to_owned()
        }
        (0, false) => format!("no weights: neither {INDEX} nor {SINGLE} nor another *.safetensors file"),
        (_, _) => {
            format!("several weight files ({}), but no {INDEX} that says what is in them", found.join(", "))
        }
    };
    Err(CheckpointError::NoWeights { dir: dir.to_owned(), detail })
}
