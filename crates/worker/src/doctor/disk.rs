//! How fast a checkpoint's folder is read, without the page cache where that can be had.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cluster::doctor::Disk;
use rustix::fs::{Advice, fadvise};
use rustix::io::{ReadWriteFlags, preadv2};

/// As much as is read, or for so long.
const BYTES: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_millis(500);
const BLOCK: usize = 4 << 20;
/// What is asked for to see where it comes from.
const SAMPLE: usize = 4 << 10;

/// Reads the beginning of the largest weight file. Blocks.
pub(super) fn read_speed(model: &Path) -> io::Result<Disk> {
    let (path, length) = largest(model)?;
    let file = File::open(path)?;
    let end = length.min(BYTES);
    // Pages that another process has mapped stay.
    let _ = fadvise(&file, 0, None, Advice::DontNeed);
    let cached = is_cached(&file, end / 2);
    let mut block = vec![0; BLOCK];
    let (mut bytes, began) = (0, Instant::now());
    while bytes < end && began.elapsed() < LIMIT {
        let most = BLOCK.min(usize::try_from(end - bytes).unwrap_or(BLOCK));
        match file.read_at(&mut block[..most], bytes)? {
            0 => break,
            read => bytes += read as u64,
        }
    }
    Ok(Disk { bytes, time: began.elapsed(), cached })
}

/// The largest file of weights.
fn largest(model: &Path) -> io::Result<(PathBuf, u64)> {
    let mut largest = None;
    for entry in fs::read_dir(model)? {
        let path = entry?.path();
        let length = fs::metadata(&path)?.len();
        let weights = path.extension().is_some_and(|extension| extension == "safetensors");
        if weights && largest.as_ref().is_none_or(|(_, most)| length > *most) {
            largest = Some((path, length));
        }
    }
    largest.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Whether bytes come without waiting for a disk. File systems that cannot tell are taken at their word.
fn is_cached(file: &File, at: u64) -> bool {
    let mut sample = [0; SAMPLE];
    preadv2(file, &mut [IoSliceMut::new(&mut sample)], at, ReadWriteFlags::NOWAIT).is_ok_and(|read| read > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_weight_file_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, bytes: usize| {
            fs::write(folder.path().join(name), vec![1; bytes]).expect("a file");
        };
        assert!(read_speed(folder.path()).is_err(), "there is none");
        write("tokenizer.json", 9000);
        write("a.safetensors", 1000);
        write("b.safetensors", 5000);
        let disk = read_speed(folder.path()).expect("it is there");
        assert_eq!(disk.bytes, 5000);
        assert!(disk.rate() > 0);
    }
}
