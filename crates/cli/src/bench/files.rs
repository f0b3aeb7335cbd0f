//! A checkpoint's files of weights, read without being understood: what loading is compared with.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use model::readers;
use rustix::fs::{Advice, fadvise};

/// Bytes that a thread reads at a time.
const BLOCK_BYTES: usize = 8 << 20;

/// The files of weights with their sizes.
pub(super) fn weights(dir: &Path) -> Result<Vec<(File, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = File::open(&path).with_context(|| path.display().to_string())?;
            let bytes = file.metadata().with_context(|| path.display().to_string())?.len();
            files.push((file, bytes));
        }
    }
    if files.is_empty() {
        bail!("{}: no *.safetensors file", dir.display());
    }
    Ok(files)
}

/// Has the system forget what it keeps of the files.
pub(super) fn forget(files: &[(File, u64)]) -> Result<()> {
    for (file, _) in files {
        // What was written and is not on the disk yet would be kept.
        file.sync_all().context("--cold")?;
        fadvise(file, 0, None, Advice::DontNeed).context("--cold: the system does not forget the files")?;
    }
    Ok(())
}

/// Seconds of reading everything, by as many threads as read when a checkpoint is loaded.
pub(super) fn read(files: &[(File, u64)]) -> Result<f64> {
    let blocks: Vec<(usize, u64)> = files
        .iter()
        .enumerate()
        .flat_map(|(file, (_, bytes))| (0..*bytes).step_by(BLOCK_BYTES).map(move |first| (file, first)))
        .collect();
    let next = AtomicUsize::new(0);
    let reader = || -> Result<()> {
        let mut buffer = vec![0; BLOCK_BYTES];
        while let Some(&(index, first)) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (file, bytes) = &files[index];
            let count = usize::try_from(bytes - first).unwrap_or(usize::MAX).min(BLOCK_BYTES);
            file.read_exact_at(&mut buffer[..count], first).context("reading the checkpoint's files")?;
        }
        Ok(())
    };
    let started = Instant::now();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..readers()).map(|_| scope.spawn(reader)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic in a reader"))
    })?;
    Ok(started.elapsed().as_secs_f64())
}
