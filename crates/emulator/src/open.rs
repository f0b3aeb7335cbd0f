//! Opens the libraries in this process, for tests.

use std::sync::OnceLock;

use libloading::Library;

/// Makes the emulator this process's GPU, before its first call to CUDA. Whether there is one; says so where there is none.
///
/// # Panics
/// Like [`crate::libraries`].
pub fn open() -> bool {
    static OPEN: OnceLock<bool> = OnceLock::new();
    *OPEN.get_or_init(|| match crate::libraries() {
        Ok(folder) => {
            for name in ["libcuda.so", "libnvrtc.so", "libcublasLt.so", "libnccl.so.2"] {
                // SAFETY: a library of our own, whose initialisers do nothing. It stays open.
                let library = unsafe { Library::new(folder.join(name)) };
                std::mem::forget(library.unwrap_or_else(|e| panic!("{name}: {e}")));
            }
            true
        }
        Err(absent) => {
            eprintln!("skipped: {absent}");
            false
        }
    })
}
