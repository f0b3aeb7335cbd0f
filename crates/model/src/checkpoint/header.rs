//! The header of a safetensors file, read without the data and without trusting a number in it.
//!
//! Format (<https://github.com/huggingface/safetensors>): eight bytes of length N, little-endian; N bytes of
//! a JSON object with an entry `{"dtype", "shape", "data_offsets": [begin, end]}` for each tensor and an
//! optional `"__metadata__"`; then the data, which the tensors cover without a hole.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value, json};

use super::error::CheckpointError;

/// Bytes of the length in front of the header.
const LENGTH_BYTES: u64 = 8;
/// Longer headers are refused, as by the format's own library.
const MAX_HEADER_BYTES: u64 = 100 << 20;
/// How a Git LFS pointer file begins.
const LFS_PREFIX: &[u8] = b"version https://git-lfs";
/// The key that is no tensor.
const METADATA: &str = "__metadata__";

/// What a file says of its tensors, in the order in which it says it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Header {
    pub(super) metadata: Option<Map<String, Value>>,
    pub(super) tensors: Vec<Entry>,
    /// Where the data begins in the file.
    pub(super) data_start: u64,
}

/// One tensor of a file: checked to lie in it and to have as many bytes as its shape says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// Relative to the start of the data.
    pub(super) begin: u64,
    pub(super) end: u64,
}

impl Header {
    /// Reads and checks the header of an open file.
    pub(super) fn read(file: &File, path: &Path) -> Result<Header, CheckpointError> {
        let io = |source| CheckpointError::io(path, source);
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let file_bytes = metadata.len();
        refuse_pointer(file, file_bytes, path)?;
        let malformed = |detail: String| CheckpointError::Header { path: path.to_owned(), detail };
        let truncated =
            |expected| CheckpointError::Truncated { path: path.to_owned(), expected, found: file_bytes };
        if file_bytes < LENGTH_BYTES {
            return Err(truncated(LENGTH_BYTES));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            return Err(malformed(format!(
                "a header of {length} bytes, at most {MAX_HEADER_BYTES} are read"
            )));
        }
        let data_start = LENGTH_BYTES + length;
        if data_start > file_bytes {
            return Err(truncated(data_start));
        }
        let mut text = vec![0; length as usize];
        file.read_exact_at(&mut text, LENGTH_BYTES).map_err(io)?;
        let raw: RawHeader = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        let tensors = raw
            .tensors
            .into_iter()
            .map(|(name, raw)| raw.check(name, path))
            .collect::<Result<Vec<_>, _>>()?;
        let data_bytes = data_length(&tensors, path)?;
        let expected = data_start.checked_add(data_bytes).ok_or_else(|| truncated(u64::MAX))?;
        if expected > file_bytes {
            return Err(truncated(expected));
        }
        if expected < file_bytes {
            return Err(malformed(format!("{} bytes behind the last tensor", file_bytes - expected)));
        }
        Ok(Header { metadata: raw.metadata, tensors, data_start })
    }

    /// Bytes of the file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.data_start + self.tensors.iter().map(|tensor| tensor.end).max().unwrap_or(0)
    }

    /// The bytes in front of the data: length and JSON, padded so that the data is aligned to 8 bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut entries = Map::new();
        if let Some(metadata) = &self.metadata {
            entries.insert(METADATA.to_owned(), metadata.clone().into());
        }
        for tensor in &self.tensors {
            let (dtype, offsets) = (tensor.dtype.to_string(), [tensor.begin, tensor.end]);
            let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": offsets });
            entries.insert(tensor.name.clone(), entry);
        }
        let mut text = Value::from(entries).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
        [&(text.len() as u64).to_le_bytes()[..], &text].concat()
    }
}

fn refuse_pointer(file: &File, file_bytes: u64, path: &Path) -> Result<(), CheckpointError> {
    if file_bytes < LFS_PREFIX.len() as u64 {
        return Ok(());
    }
    let mut start = [0; LFS_PREFIX.len()];
    file.read_exact_at(&mut start, 0).map_err(|source| CheckpointError::io(path, source))?;
    if start == LFS_PREFIX { Err(CheckpointError::LfsPointer { path: path.to_owned() }) } else { Ok(()) }
}

/// Bytes that the tensors cover, which must be without hole or overlap.
fn data_length(tensors: &[Entry], path: &Path) -> Result<u64, CheckpointError> {
    let mut by_position: Vec<&Entry> = tensors.iter().collect();
    by_position.sort_by_key(|tensor| (tensor.begin, tensor.end));
    let mut covered = 0;
    for tensor in by_position {
        if tensor.begin != covered {
            let what = if tensor.begin < covered {
                "overlaps the tensor before it"
            } else {
                "leaves a hole before it"
            };
            return Err(CheckpointError::Entry {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                detail: format!(
                    "{what}: it begins at byte {}, and the one before ends at {covered}",
                    tensor.begin
                ),
            });
        }
        covered = tensor.end;
    }
    Ok(covered)
}

/// The header as written; unlike a map, it notices a name that comes twice.
struct RawHeader {
    metadata: Option<Map<String, Value>>,
    tensors: Vec<(String, RawEntry)>,
}

#[derive(serde::Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawEntry {
    fn check(self, name: String, path: &Path) -> Result<Entry, CheckpointError> {
        let wrong = |detail| CheckpointError::Entry { path: path.to_owned(), tensor: name.clone(), detail };
        let dtype: Dtype = serde_json::from_value(Value::from(self.dtype.as_str()))
            .map_err(|_| wrong(format!("has an unknown dtype {:?}", self.dtype)))?;
        let [begin, end] = self.data_offsets;
        let bytes = end
            .checked_sub(begin)
            .ok_or_else(|| wrong(format!("ends at byte {end}, before its start {begin}")))?;
        let elements = self.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let bits = elements.and_then(|elements| elements.checked_mul(dtype.bitsize() as u64));
        if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != bytes) {
            let detail =
                format!("has {bytes} bytes, which does not fit shape {:?} of {}", self.shape, self.dtype);
            return Err(wrong(detail));
        }
        Ok(Entry { name, dtype, shape: self.shape, begin, end })
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader { metadata: None, tensors: Vec::new() };
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("the entry {name} comes twice")));
            }
            if name == METADATA {
                header.metadata = Some(map.next_value()?);
            } else {
                header.tensors.push((name, map.next_value()?));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Header, CheckpointError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part.safetensors");
        std::fs::write(&path, bytes).unwrap();
        Header::read(&File::open(&path).unwrap(), &path)
    }

    /// A file of this header and so many bytes of data.
    fn file(json: &str, data: usize) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat()
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
        "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;

    #[test]
    fn a_header_keeps_its_order_and_encodes_back() {
        let header = read(&file(GOOD, 16)).unwrap();
        let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        let encoded = [header.encode(), vec![0; 16]].concat();
        let again = read(&encoded).unwrap();
        assert_eq!((&again.tensors, &again.metadata), (&header.tensors, &header.metadata));
        assert_eq!(again.data_start % 8, 0);
        assert!(safetensors::SafeTensors::deserialize(&encoded).is_ok());
    }

    #[test]
    fn every_contradiction_is_named() {
        let one = |entry: &str| format!(r#"{{"t":{entry}}}"#);
        let cases = [
            (file(GOOD, 15), "183 bytes expected, 182 found: the file is truncated, download it again"),
            (file(GOOD, 17), "1 bytes behind the last tensor"),
            (b"\x00\x01".to_vec(), "8 bytes expected, 2 found"),
            (file(GOOD, 0)[..50].to_vec(), "50 found: the file is truncated"),
            (u64::MAX.to_le_bytes().to_vec(), "at most 104857600 are read"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n".to_vec(),
                "Git LFS pointer",
            ),
            (file("[]", 0), "an object of tensors"),
            (file("{", 0), "not a valid safetensors file"),
            (file(&one("7"), 0), "not a valid safetensors file"),
            (
                file(&one(r#"{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}"#), 1),
                "tensor t has an unknown dtype \"Q4\"",
            ),
            (file(&one(r#"{"dtype":"U8","shape":[1],"data_offsets":[1,0]}"#), 1), "tensor t ends at byte 0"),
            (file(&one(r#"{"dtype":"U8","shape":[2],"data_offsets":[0,1]}"#), 1), "tensor t has 1 bytes"),
            (file(&one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#), 1), "tensor t has 1 bytes"),
            (
                file(&one(r#"{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#), 0),
                "tensor t has 0 bytes",
            ),
            (file(&one(r#"{"dtype":"U8","shape":[1],"data_offsets":[1,2]}"#), 2), "tensor t leaves a hole"),
            (
                file(
                    r#"{"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                        "u":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                    3,
                ),
                "tensor u overlaps",
            ),
            (
                file(
                    r#"{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
                        "t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                    0,
                ),
                "the entry t comes twice",
            ),
        ];
        for (bytes, expected) in cases {
            let message = read(&bytes).unwrap_err().to_string();
            assert!(message.contains("part.safetensors: ") && message.contains(expected), "{message}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
            let _ = read(&[&(bytes.len() as u64).to_le_bytes()[..], &bytes].concat());
        }

        /// A damaged header is refused, or says the same of every byte as the format's own library reads.
        #[test]
        fn damaged_headers_never_panic(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), digits: bool,
        ) {
            let mut bytes = file(GOOD, 16);
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = if digits { b'0' + byte % 10 } else { byte };
            }
            if let (Ok(header), Ok(other)) = (read(&bytes), safetensors::SafeTensors::deserialize(&bytes)) {
                for tensor in &header.tensors {
                    let theirs = other.tensor(&tensor.name).unwrap();
                    prop_assert_eq!(theirs.data().len() as u64, tensor.end - tensor.begin);
                }
            }
        }
    }
}
