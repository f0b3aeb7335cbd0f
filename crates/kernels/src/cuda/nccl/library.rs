//! NCCL's library and the functions of it that are used, by names of our own: cudarc looks for `libnccl.so`, which comes with
//! development packages alone, and panics where a function is missing.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library as File;

use crate::{Error, Result};

/// The first version whose communicators take everything that is in [`Config`].
const OLDEST: c_int = 21_800;
const NAMES: &[&str] = &["libnccl.so.2", "libnccl.so"];

/// A result of NCCL's.
pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;
/// Of a non-blocking communicator: ask again.
pub(crate) const IN_PROGRESS: Status = 7;

pub(crate) const FLOAT32: c_int = 7;
pub(crate) const SUM: c_int = 0;

/// A communicator.
pub(crate) type Handle = *mut c_void;
type Stream = *mut c_void;

/// What makes ranks find each other.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawId(pub(crate) [u8; 128]);

/// `ncclConfig_t` as of 2.18, which later versions take too: it tells its size and version.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return before they are done; the rest is NCCL's choice.
    pub(crate) fn non_blocking() -> Self {
        let undefined = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: OLDEST as u32,
            blocking: 0,
            cga_cluster_size: undefined,
            min_ctas: undefined,
            max_ctas: undefined,
            net_name: std::ptr::null(),
            split_share: undefined,
        }
    }
}

macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions, as nccl.h declares them.
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn find(file: &File) -> std::result::Result<Self, &'static str> {
                // SAFETY: the symbols are functions of these types in every version since 2.14.
                Ok(Self { $($name: *unsafe { file.get($symbol.as_bytes()) }.map_err(|_| $symbol)?,)* })
            }
        }
    };
}

functions! {
    version = "ncclGetVersion": fn(*mut c_int) -> Status;
    unique_id = "ncclGetUniqueId": fn(*mut RawId) -> Status;
    begin = "ncclCommInitRankConfig": fn(*mut Handle, c_int, RawId, c_int, *mut Config) -> Status;
    state = "ncclCommGetAsyncError": fn(Handle, *mut Status) -> Status;
    finish = "ncclCommFinalize": fn(Handle) -> Status;
    destroy = "ncclCommDestroy": fn(Handle) -> Status;
    abort = "ncclCommAbort": fn(Handle) -> Status;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    receive = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    group_start = "ncclGroupStart": fn() -> Status;
    group_end = "ncclGroupEnd": fn() -> Status;
    text = "ncclGetErrorString": fn(Status) -> *const c_char;
    last_words = "ncclGetLastError": fn(Handle) -> *const c_char;
}

/// The library, opened once.
pub(crate) struct Nccl {
    pub(crate) functions: Functions,
    pub(crate) version: u32,
    /// Stays open.
    _file: File,
}

impl Nccl {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where it is missing or too old: in a sentence for users.
    pub(crate) fn open() -> Result<&'static Self> {
        static OPENED: OnceLock<Result<Nccl>> = OnceLock::new();
        OPENED.get_or_init(Self::load).as_ref().map_err(Error::clone)
    }

    fn load() -> Result<Self> {
        // SAFETY: NCCL's initialisers do nothing that could harm.
        let file = NAMES.iter().find_map(|name| unsafe { File::new(*name) }.ok());
        let file = file.ok_or_else(|| {
            Error::Unsupported(
                "NCCL (libnccl.so.2) is not installed on this machine: install it, or put its folder into LD_LIBRARY_PATH".into(),
            )
        })?;
        let functions = Functions::find(&file).map_err(|missing| {
            Error::Unsupported(format!("NCCL here is older than 2.18, which is needed: it has no {missing}"))
        })?;
        let mut version = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (functions.version)(&raw mut version) };
        if status != SUCCESS || version < OLDEST {
            let shown = format!("{}.{}", version / 10_000, version % 10_000 / 100);
            return Err(Error::Unsupported(format!("NCCL here is {shown}; 2.18 or newer is needed")));
        }
        Ok(Self { functions, version: version.unsigned_abs(), _file: file })
    }

    /// A failure, in NCCL's words.
    pub(crate) fn failed(&self, what: &str, status: Status, handle: Handle) -> Error {
        // SAFETY: both give texts that stay valid until the next call; a null handle asks for the thread's last words.
        let (text, last) = unsafe { ((self.functions.text)(status), (self.functions.last_words)(handle)) };
        let [text, last] = [text, last].map(|words| match words.is_null() {
            true => String::new(),
            // SAFETY: a C string, see above.
            false => unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned(),
        });
        let why = if last.is_empty() { text } else { format!("{text}: {last}") };
        Error::Device { what: what.into(), why }
    }
}
