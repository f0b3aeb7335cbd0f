//! NVRTC, NVIDIA's compiler as a library: CUDA C++ to the machine code of a GPU, which need not be there.

use std::ffi::{CString, NulError, c_char, c_int};
use std::fmt;
use std::ptr;

use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::arch::Arch;
use super::sources::Source;
use crate::Error;

/// Earlier ones do not know what the kernels are written in.
const OLDEST: Version = Version { major: 12, minor: 0 };

/// Why kernels cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// NVRTC is not on this machine.
    #[error(
        "the CUDA kernels need NVRTC, and libnvrtc.so.13 is not found: install CUDA 13, or `pip install \
         nvidia-cuda-nvrtc==13.0.88`, and put the library's folder in LD_LIBRARY_PATH"
    )]
    NoCompiler,
    /// A part of NVRTC is not beside it.
    #[error(
        "NVRTC {0} does not find its libnvrtc-builtins: put the folder of that library, as installed with NVRTC, in \
         LD_LIBRARY_PATH"
    )]
    NoBuiltins(Version),
    /// The NVRTC that is found first is of an old CUDA.
    #[error(
        "NVRTC {0} is too old for the CUDA kernels: put the folder of CUDA 13's in LD_LIBRARY_PATH, before others"
    )]
    OldCompiler(Version),
    /// A source that NVRTC does not take.
    #[error("{source_name} does not compile for {arch}:\n{log}")]
    Rejected {
        /// The file.
        source_name: &'static str,
        /// For what.
        arch: Arch,
        /// What NVRTC says.
        log: String,
    },
    /// NVRTC itself failed.
    #[error("NVRTC's {call} failed: {code}")]
    Failed {
        /// The function.
        call: &'static str,
        /// Its result.
        code: String,
    },
}

impl From<CompileError> for Error {
    fn from(error: CompileError) -> Self {
        Error::Unsupported(error.to_string())
    }
}

impl From<NulError> for CompileError {
    fn from(error: NulError) -> Self {
        CompileError::Failed { call: "arguments", code: error.to_string() }
    }
}

/// A version of NVRTC, which is that of its CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Before the dot.
    pub major: i32,
    /// After it.
    pub minor: i32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What becomes of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compiled {
    /// A cubin, or PTX with its closing NUL.
    pub(super) image: Vec<u8>,
    /// What the compiler said, without the closing NUL.
    pub(super) log: String,
}

/// The options that a source is compiled with. No product is fused with an addition unless the source says so: results do
/// not depend on what the compiler finds worth fusing.
pub(super) fn options(arch: Arch) -> Vec<String> {
    let architecture = format!("--gpu-architecture={arch}");
    [architecture.as_str(), "--fmad=false", "--std=c++17", "-default-device", "--ptxas-options=-v"]
        .map(str::to_owned)
        .into()
}

/// The library, which is there: every call to it goes through this value. Threads may compile at the same time.
#[derive(Debug, Clone)]
pub struct Nvrtc {
    version: Version,
    /// As in [`Arch::number`].
    archs: Vec<c_int>,
}

impl Nvrtc {
    /// Finds the library, as the dynamic linker does.
    ///
    /// # Errors
    /// [`CompileError::NoCompiler`] where it is missing, [`CompileError::OldCompiler`] where another is found.
    pub fn open() -> Result<Self, CompileError> {
        // SAFETY: a library of one of NVRTC's names is loaded, whose initialisers ask nothing of us.
        if !unsafe { sys::is_culib_present() } {
            return Err(CompileError::NoCompiler);
        }
        let mut version = Version { major: 0, minor: 0 };
        // SAFETY: the library is present (a missing one would panic), and both places take an int.
        succeed("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut version.major, &mut version.minor) })?;
        if version < OLDEST {
            return Err(CompileError::OldCompiler(version));
        }
        let mut count: c_int = 0;
        // SAFETY: the library is present; one int is written.
        succeed("nvrtcGetNumSupportedArchs", unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) })?;
        let mut archs: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the library is present; as many ints are written as the call above said.
        succeed("nvrtcGetSupportedArchs", unsafe { sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()) })?;
        Ok(Nvrtc { version, archs })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether it makes code for `arch`.
    pub(super) fn knows(&self, arch: Arch) -> bool {
        self.archs.contains(&arch.number())
    }

    /// Compiles `source`, which may include `headers` by their names.
    pub(super) fn compile(
        &self,
        source: &Source,
        headers: &[Source],
        arch: Arch,
    ) -> Result<Compiled, CompileError> {
        let program = Program::new(source, headers)?;
        let result = program.compile(&options(arch))?;
        let log = text(program.log()?);
        match result {
            nvrtcResult::NVRTC_SUCCESS => {}
            nvrtcResult::NVRTC_ERROR_COMPILATION => {
                return Err(CompileError::Rejected { source_name: source.name, arch, log });
            }
            nvrtcResult::NVRTC_ERROR_BUILTIN_OPERATION_FAILURE => {
                return Err(CompileError::NoBuiltins(self.version));
            }
            other => succeed("nvrtcCompileProgram", other)?,
        }
        let image = if arch.is_ptx() { program.ptx()? } else { program.cubin()? };
        Ok(Compiled { image, log })
    }
}

/// A program of NVRTC's, destroyed with this value.
struct Program(nvrtcProgram);

impl Program {
    fn new(source: &Source, headers: &[Source]) -> Result<Self, CompileError> {
        let name = CString::new(source.name)?;
        let text = CString::new(source.text)?;
        let header_names = c_strings(headers.iter().map(|header| header.name))?;
        let header_texts = c_strings(headers.iter().map(|header| header.text))?;
        let mut program: nvrtcProgram = ptr::null_mut();
        // SAFETY: all strings end with a NUL, both lists have as many as is said, and NVRTC copies what it keeps.
        let result = unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                pointers(&header_texts).as_ptr(),
                pointers(&header_names).as_ptr(),
            )
        };
        succeed("nvrtcCreateProgram", result)?;
        Ok(Program(program))
    }

    /// The result is that of the source, or of the library.
    fn compile(&self, options: &[String]) -> Result<nvrtcResult, CompileError> {
        let options = c_strings(options.iter().map(String::as_str))?;
        // SAFETY: the program lives; the options are NUL-terminated strings, as many as is said.
        Ok(unsafe { sys::nvrtcCompileProgram(self.0, options.len() as c_int, pointers(&options).as_ptr()) })
    }

    fn log(&self) -> Result<Vec<u8>, CompileError> {
        self.output("nvrtcGetProgramLog", sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)
    }

    fn ptx(&self) -> Result<Vec<u8>, CompileError> {
        self.output("nvrtcGetPTX", sys::nvrtcGetPTXSize, sys::nvrtcGetPTX)
    }

    fn cubin(&self) -> Result<Vec<u8>, CompileError> {
        self.output("nvrtcGetCUBIN", sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)
    }

    /// What `read` gives, which is as long as `size` says.
    fn output(
        &self,
        call: &'static str,
        size: unsafe fn(nvrtcProgram, *mut usize) -> nvrtcResult,
        read: unsafe fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
    ) -> Result<Vec<u8>, CompileError> {
        let mut length = 0;
        // SAFETY: the program lives, and one size is written.
        succeed(call, unsafe { size(self.0, &mut length) })?;
        let mut bytes = vec![0u8; length];
        // SAFETY: the program lives, and as many bytes are written as `size` said.
        succeed(call, unsafe { read(self.0, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program lives until here, and nobody has it afterwards. A failure would leave it behind, no more.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn succeed(call: &'static str, result: nvrtcResult) -> Result<(), CompileError> {
    result.result().map_err(|NvrtcError(code)| CompileError::Failed { call, code: format!("{code:?}") })
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<CString>, NulError> {
    texts.map(CString::new).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).trim_end_matches(['\0', '\n']).to_owned()
}
