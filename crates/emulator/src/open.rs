//! Opens the libraries in this process, for tests.

use std::ffi::c_int;
use std::sync::OnceLock;

use libloading::Library;

/// Makes the emulator this process's GPU, before its first call to CUDA. Whether there is one; says so where there is none.
///
/// # Panics
/// Like [`crate::libraries`].
pub fn open() -> bool {
    open_with(1, false)
}

/// Likewise, with so many GPUs (unless the environment says how many), whose streams run `beside` the threads that submit to them, as a
/// GPU's do, instead of on those threads. A process has one kind: the first call decides.
///
/// # Panics
/// Like [`crate::libraries`].
pub fn open_with(devices: u16, beside: bool) -> bool {
    static OPEN: OnceLock<bool> = OnceLock::new();
    *OPEN.get_or_init(|| match crate::libraries() {
        Ok(folder) => {
            for name in ["libcuda.so", "libnvrtc.so", "libcublasLt.so", "libnccl.so.2"] {
                // SAFETY: a library of our own, whose initialisers do nothing. It stays open.
                let library = unsafe { Library::new(folder.join(name)) };
                let library = library.unwrap_or_else(|e| panic!("{name}: {e}"));
                if name == "libcuda.so" {
                    // SAFETY: the function's own type; no other call was made yet.
                    unsafe {
                        let configure =
                            library.get::<unsafe extern "C" fn(c_int, c_int)>(b"emulator_configure");
                        configure.expect("the emulator's own function")(devices.into(), beside.into());
                    }
                }
                std::mem::forget(library);
            }
            true
        }
        Err(absent) => {
            eprintln!("skipped: {absent}");
            false
        }
    })
}
