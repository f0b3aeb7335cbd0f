//! Runs the C++ compiler: objects and libraries that are named by a hash of all that went into them, so nothing is made twice.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest, Sha256};

use crate::{Absent, files};

/// Compilers that run at a time.
const AT_A_TIME: usize = 2;

/// For every source. As NVRTC is told: no contraction of a · b + c, and casts between pointer types are no mistake.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-g1",
    "-march=native",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// For kernels besides: an index outside of an array, a sum or a shift that overflows ends the process like a bad address.
const CHECKS: &[&str] =
    &["-fsanitize=bounds,signed-integer-overflow,shift", "-fsanitize-undefined-trap-on-error"];

/// A C++ compiler and the folder that it works in.
pub(crate) struct Compiler {
    command: Vec<String>,
    include: Vec<PathBuf>,
    folder: PathBuf,
    /// Hash of the compiler, the processor, the flags and the emulator's headers.
    plain: Vec<u8>,
    /// Likewise, with the kernels' headers.
    simt: Vec<u8>,
}

/// Which kind of file an object was made from.
enum Kind {
    /// C++ of the emulator, or of a test.
    Plain,
    /// A kernel's source, or a test that calls kernels: `simt.h` goes before it.
    Simt,
}

impl Compiler {
    /// `$CXX` or `c++`, to work in `folder`, with the headers of the emulator in `src` and those of the kernels.
    pub(crate) fn find(src: &Path, kernels: &Path, folder: &Path) -> Result<Self, Absent> {
        let name = env::var("CXX").unwrap_or_else(|_| "c++".into());
        let command: Vec<String> = name.split_whitespace().map(str::to_owned).collect();
        let Some(program) = command.first() else { return Err(Absent(name)) };
        // Its predefined macros tell its version and what `native` stands for.
        let mut ask = Command::new(program);
        ask.args(&command[1..]).args(FLAGS).args(["-E", "-dM", "-x", "c++", "/dev/null"]);
        let Ok(macros) = ask.output() else { return Err(Absent(name)) };
        let mut hash = Sha256::new();
        hash.update(succeeded(&ask, macros).stdout);
        hash.update([FLAGS, CHECKS].concat().join(" "));
        let folders = [src.to_owned(), src.join("simt"), src.join("driver")];
        hash_files(&mut hash, folders.iter().flat_map(|folder| files(folder, "h")));
        let plain = hash.clone().finalize().to_vec();
        hash_files(&mut hash, files(kernels, "cuh"));
        let simt = hash.finalize().to_vec();
        fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let include = vec![src.to_owned(), kernels.to_owned()];
        Ok(Self { command, include, folder: folder.to_owned(), plain, simt })
    }

    /// The folder with the four libraries of the emulator's `sources` and the `kernels`.
    pub(crate) fn libraries(&self, sources: &[PathBuf], kernels: &[PathBuf]) -> PathBuf {
        let _lock = self.lock();
        let all: Vec<PathBuf> = sources.iter().chain(kernels).cloned().collect();
        let objects = self.objects(&all);
        let done = self.folder.join(name_of(&objects));
        if done.is_dir() {
            return done;
        }
        let making = self.folder.join("making");
        let _ = fs::remove_dir_all(&making);
        fs::create_dir(&making).unwrap_or_else(|e| panic!("{}: {e}", making.display()));
        let made_from = |stem: &str| {
            let index = all.iter().position(|source| source.file_stem().is_some_and(|s| s == stem));
            objects[index.expect("a source of this name")].clone()
        };
        let [nvrtc, cublaslt, nccl] = ["nvrtc", "cublaslt", "nccl"].map(made_from);
        let others = [&nvrtc, &cublaslt, &nccl];
        let driver: Vec<_> = objects.iter().filter(|object| !others.contains(object)).cloned().collect();
        self.link(&making, "libcuda.so", &driver, &[]);
        self.link(&making, "libnvrtc.so", &[nvrtc], &[]);
        // These submit their work to the driver next to them.
        for (name, object) in [("libcublasLt.so", cublaslt), ("libnccl.so.2", nccl)] {
            self.link(&making, name, &[object, making.join("libcuda.so")], &["-Wl,-rpath,$ORIGIN"]);
        }
        fs::rename(&making, &done).unwrap_or_else(|e| panic!("{}: {e}", done.display()));
        done
    }

    /// An executable of all these sources.
    pub(crate) fn program(&self, name: &str, sources: &[PathBuf]) -> PathBuf {
        let _lock = self.lock();
        let objects = self.objects(sources);
        let done = self.folder.join(format!("{name}-{}", name_of(&objects)));
        if !done.is_file() {
            let making = self.folder.join("making-program");
            self.run(|command| command.args(["-pthread", "-o"]).arg(&making).args(&objects));
            fs::rename(&making, &done).unwrap_or_else(|e| panic!("{}: {e}", done.display()));
        }
        done
    }

    /// Held while files are made: several tests may want them at the same time.
    fn lock(&self) -> File {
        let path = self.folder.join("lock");
        let lock = File::create(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        lock.lock().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        lock
    }

    /// The objects of these sources, in their order.
    fn objects(&self, sources: &[PathBuf]) -> Vec<PathBuf> {
        let objects: Vec<PathBuf> = sources.iter().map(|source| self.object_path(source)).collect();
        let pairs: Vec<_> = sources.iter().zip(&objects).collect();
        let next = AtomicUsize::new(0);
        // Else the first panic would be followed by that of the scope, which says nothing.
        let failure = Mutex::new(None);
        thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| {
                    while let Some((source, object)) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(words) = self.compile(source, object) {
                            *failure.lock().expect("no thread panicked") = Some(words);
                        }
                    }
                });
            }
        });
        if let Some(words) = failure.into_inner().expect("no thread panicked") {
            panic!("{words}");
        }
        objects
    }

    fn object_path(&self, source: &Path) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update(match kind(source) {
            Kind::Plain => &self.plain,
            Kind::Simt => &self.simt,
        });
        hash_files(&mut hash, [source.to_owned()]);
        let stem = source.file_stem().expect("a file").to_string_lossy();
        self.folder.join(format!("{stem}-{}.o", hex(&hash.finalize())))
    }

    fn compile(&self, source: &Path, object: &Path) -> Result<(), String> {
        if object.is_file() {
            return Ok(());
        }
        let making = object.with_extension("making");
        let mut command = self.command();
        command.args(FLAGS);
        for include in &self.include {
            command.arg("-I").arg(include);
        }
        if matches!(kind(source), Kind::Simt) {
            command.args(CHECKS).args(["-DPHALANX_EMULATOR", "-include", "simt.h"]);
        }
        command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&making);
        let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
        if !output.status.success() {
            return Err(failed(&command, &output));
        }
        fs::rename(&making, object).map_err(|e| format!("{}: {e}", object.display()))
    }

    fn link(&self, folder: &Path, name: &str, objects: &[PathBuf], flags: &[&str]) {
        self.run(|command| {
            command
                .args(["-shared", "-pthread", "-Wl,-z,nodelete", "-Wl,-z,defs"])
                .arg(format!("-Wl,-soname,{name}"))
                .args(flags)
                .arg("-o")
                .arg(folder.join(name))
                .args(objects)
        });
    }

    fn run(&self, arguments: impl FnOnce(&mut Command) -> &mut Command) {
        let mut command = self.command();
        arguments(&mut command);
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        succeeded(&command, output);
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]);
        command
    }
}

fn kind(source: &Path) -> Kind {
    let in_tests = source.components().any(|part| part.as_os_str() == "tests");
    if in_tests || source.extension().is_some_and(|e| e == "cu") { Kind::Simt } else { Kind::Plain }
}

fn succeeded(command: &Command, output: Output) -> Output {
    assert!(output.status.success(), "{}", failed(command, &output));
    output
}

fn failed(command: &Command, output: &Output) -> String {
    format!("{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr))
}

fn hash_files(hash: &mut Sha256, paths: impl IntoIterator<Item = PathBuf>) {
    for path in paths {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    }
}

/// A name for what is made of these objects, whose own names tell what they are made of.
fn name_of(objects: &[PathBuf]) -> String {
    let mut hash = Sha256::new();
    for object in objects {
        hash.update(object.as_os_str().as_encoded_bytes());
    }
    hex(&hash.finalize())
}

/// Enough of a hash to be unique here.
fn hex(hash: &[u8]) -> String {
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}
