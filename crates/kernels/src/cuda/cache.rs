//! Compiled modules as files of a folder.
//!
//! A file's name tells what it was made from: `norm-sm_80-<digest of sources and options>-nvrtc13.0.module`. It holds
//! [`MAGIC`], the SHA-256 of what follows, the length of the compiler's log (u32, little-endian), the log, and the image.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::arch::Arch;
use super::nvrtc::{Compiled, Version, options};
use super::sources::Source;

const MAGIC: &[u8; 16] = b"phalanx module 1";
const DIGEST_BYTES: usize = 32;
const SUFFIX: &str = ".module";
/// No module comes near it: a larger file is none of ours.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A folder of modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Folder(PathBuf);

/// What a module is made from, the compiler's version aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key(String);

impl Key {
    pub(super) fn new(source: &Source, headers: &[Source], arch: Arch) -> Self {
        let mut digest = Sha256::new();
        // Each part with its length before it: no two lists of parts read the same.
        let mut add = |part: &str| {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        };
        for file in [source].into_iter().chain(headers) {
            add(file.name);
            add(file.text);
        }
        for option in options(arch) {
            add(&option);
        }
        let digest: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let stem = source.name.trim_end_matches(".cu");
        Key(format!("{stem}-{arch}-{digest}-nvrtc"))
    }

    fn file_name(&self, version: Version) -> String {
        format!("{}{version}{SUFFIX}", self.0)
    }
}

impl Folder {
    pub(super) fn new(path: PathBuf) -> Self {
        Folder(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// The module of `key` from this version of the compiler, if the folder has it whole.
    pub(super) fn read(&self, key: &Key, version: Version) -> Option<Compiled> {
        read_file(&self.0.join(key.file_name(version)))
    }

    /// Likewise, from any version of the compiler.
    pub(super) fn read_any_version(&self, key: &Key) -> Option<Compiled> {
        fs::read_dir(&self.0)
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(&key.0) && name.ends_with(SUFFIX))
            .find_map(|name| read_file(&self.0.join(name)))
    }

    /// Adds a module, or replaces it. Other processes see the whole file or none.
    pub(super) fn write(&self, key: &Key, version: Version, module: &Compiled) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        // What lies in an image is read by other users than the one who wrote it; the umask still applies.
        let mut file =
            tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(&self.0)?;
        file.write_all(&encode(module))?;
        file.persist(self.0.join(key.file_name(version)))?;
        Ok(())
    }
}

fn encode(module: &Compiled) -> Vec<u8> {
    let mut content = (module.log.len() as u32).to_le_bytes().to_vec();
    content.extend_from_slice(module.log.as_bytes());
    content.extend_from_slice(&module.image);
    [MAGIC.as_slice(), &Sha256::digest(&content), &content].concat()
}

/// `None` for anything but what [`encode`] gave: such a file is as good as missing.
fn decode(bytes: &[u8]) -> Option<Compiled> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (digest, content) = rest.split_at_checked(DIGEST_BYTES)?;
    if Sha256::digest(content).as_slice() != digest {
        return None;
    }
    let (length, content) = content.split_first_chunk()?;
    let (log, image) = content.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some(Compiled { image: image.to_vec(), log: String::from_utf8(log.to_vec()).ok()? })
}

fn read_file(path: &Path) -> Option<Compiled> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    decode(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source { name: "norm.cu", text: "kernel" };
    const HEADER: Source = Source { name: "device.cuh", text: "header" };
    const VERSION: Version = Version { major: 13, minor: 0 };

    fn module() -> Compiled {
        Compiled { image: b"\x7fELF and so on".to_vec(), log: "ptxas info".to_owned() }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::new(folder.path().join("made/on/demand"));
        let key = Key::new(&SOURCE, &[HEADER], Arch::Sm80);
        assert_eq!(folder.read(&key, VERSION), None);
        assert_eq!(folder.read_any_version(&key), None);
        folder.write(&key, VERSION, &module()).unwrap();
        folder.write(&key, VERSION, &module()).unwrap();
        assert_eq!(folder.read(&key, VERSION), Some(module()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "temporary files stay");
    }

    #[test]
    fn another_compiler_is_another_module() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::new(folder.path().to_owned());
        let key = Key::new(&SOURCE, &[HEADER], Arch::Sm80);
        folder.write(&key, VERSION, &module()).unwrap();
        assert_eq!(folder.read(&key, Version { minor: 1, ..VERSION }), None);
        assert_eq!(folder.read_any_version(&key), Some(module()));
    }

    #[test]
    fn the_key_is_of_all_that_a_module_is_made_from() {
        let key = Key::new(&SOURCE, &[HEADER], Arch::Sm80);
        assert_eq!(key, Key::new(&SOURCE, &[HEADER], Arch::Sm80));
        let changed = Source { text: "kernels", ..SOURCE };
        for other in [
            Key::new(&changed, &[HEADER], Arch::Sm80),
            Key::new(&SOURCE, &[changed], Arch::Sm80),
            Key::new(&SOURCE, &[], Arch::Sm80),
            Key::new(&SOURCE, &[HEADER], Arch::Sm90a),
        ] {
            assert_ne!(key, other);
        }
    }

    #[test]
    fn damaged_files_are_as_good_as_missing() {
        let bytes = encode(&module());
        assert_eq!(decode(&bytes), Some(module()));
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]), None, "cut at {length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(decode(&damaged), None, "changed at {at}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let folder = Folder::new(file.path().join("below"));
        let key = Key::new(&SOURCE, &[HEADER], Arch::Sm80);
        assert!(folder.write(&key, VERSION, &module()).is_err());
        assert_eq!(folder.read_any_version(&key), None);
    }
}
