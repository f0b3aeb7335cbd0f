//! A folder that appears under its name only once it is whole.
//!
//! Everything is written into `.NAME.partial` beside it, synced, and renamed at the end. An error (a full
//! disk) removes the partial folder; Ctrl-C or a power cut leaves it, under a name that nobody takes for a
//! checkpoint.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use serde_json::{Map, Value};

use super::error::CheckpointError;

/// Files are copied in pieces of this many bytes.
const CHUNK_BYTES: usize = 4 << 20;

/// An output folder in the making; dropped before [`finish`](Self::finish), it is removed.
#[derive(Debug)]
pub(super) struct Output {
    partial: PathBuf,
    target: PathBuf,
    finished: bool,
}

impl Output {
    /// Begins a folder that does not exist or is empty, whose parent exists, and that is neither `apart_from`
    /// nor in it.
    pub(super) fn create(target: &Path, apart_from: Option<&Path>) -> Result<Output, CheckpointError> {
        let refuse =
            |detail: &str| CheckpointError::Output { path: target.to_owned(), detail: detail.to_owned() };
        let name = target.file_name().ok_or_else(|| refuse("not the name of a folder to write to"))?;
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let parent = parent.canonicalize().map_err(|source| CheckpointError::io(parent, source))?;
        let target = parent.join(name);
        if let Some(source) = apart_from {
            let source = source.canonicalize().map_err(|error| CheckpointError::io(source, error))?;
            if target.starts_with(&source) {
                return Err(refuse("lies in the checkpoint to read from, choose another folder to write to"));
            }
        }
        let is_used = match fs::read_dir(&target) {
            Ok(mut entries) => entries.next().is_some(),
            Err(source) if source.kind() == io::ErrorKind::NotFound => false,
            Err(source) => return Err(CheckpointError::io(&target, source)),
        };
        if is_used {
            return Err(refuse("exists and is not empty, choose another folder to write to"));
        }
        let partial = parent.join(format!(".{}.partial", name.to_string_lossy()));
        fs::create_dir(&partial).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => CheckpointError::Output {
                path: partial.clone(),
                detail: "left by an interrupted run, or in use by another: remove it first".to_owned(),
            },
            _ => CheckpointError::io(&partial, source),
        })?;
        Ok(Output { partial, target, finished: false })
    }

    /// Where a file of the folder is for the time being.
    pub(super) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.partial.join(relative)
    }

    /// Makes a folder inside.
    pub(super) fn create_folder(&self, relative: &Path) -> Result<(), CheckpointError> {
        let path = self.path(relative);
        fs::create_dir(&path).map_err(|source| CheckpointError::io(&path, source))
    }

    /// Writes a file by `fill`, then makes sure that it is on the disk.
    pub(super) fn write(
        &self,
        relative: impl AsRef<Path>,
        fill: impl FnOnce(&mut File, &Path) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let path = self.path(relative);
        let mut file = File::create_new(&path).map_err(|source| CheckpointError::io(&path, source))?;
        fill(&mut file, &path)?;
        file.sync_all().map_err(|source| CheckpointError::io(&path, source))
    }

    /// Writes a JSON file as transformers lays it out.
    pub(super) fn write_json(
        &self,
        relative: impl AsRef<Path>,
        content: &Map<String, Value>,
    ) -> Result<(), CheckpointError> {
        self.write(relative, |file, path| {
            let io = |source| CheckpointError::io(path, source);
            let mut text = serde_json::to_vec_pretty(content).map_err(|error| io(error.into()))?;
            text.push(b'\n');
            file.write_all(&text).map_err(io)
        })
    }

    /// Writes a file of `start` and of what `source` has from byte `from` on, moving the bar.
    pub(super) fn copy(
        &self,
        relative: impl AsRef<Path>,
        start: &[u8],
        source: &Path,
        from: u64,
        progress: &ProgressBar,
    ) -> Result<(), CheckpointError> {
        let of_source = |error| CheckpointError::io(source, error);
        let mut input = File::open(source).map_err(of_source)?;
        input.seek(SeekFrom::Start(from)).map_err(of_source)?;
        self.write(relative, |file, path| {
            file.write_all(start).map_err(|error| CheckpointError::io(path, error))?;
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                let count = match input.read(&mut chunk) {
                    Ok(0) => return Ok(()),
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(of_source(error)),
                };
                file.write_all(&chunk[..count]).map_err(|error| CheckpointError::io(path, error))?;
                progress.inc(count as u64);
            }
        })
    }

    /// Gives the folder its name.
    pub(super) fn finish(mut self) -> Result<(), CheckpointError> {
        fs::rename(&self.partial, &self.target)
            .map_err(|source| CheckpointError::io(&self.target, source))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_dir_all(&self.partial)
        {
            tracing::warn!(path = %self.partial.display(), %error, "cannot remove an unfinished folder");
        }
    }
}
