//! The modules that a device loads: from a folder that was filled ahead of time, from the cache, or compiled now.

use std::env;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::thread;

use super::arch::Arch;
use super::cache::{Folder, Key};
use super::nvrtc::{CompileError, Compiled, Nvrtc};
use super::sources::{HEADERS, SOURCES, Source};
use super::usage::{KernelUsage, parse_log};

/// The variable with a folder of modules, such as `phalanx kernels compile --out` fills, that is only read.
pub const KERNELS_VARIABLE: &str = "PHALANX_KERNELS";
/// The variable with the folder of the cache; without it, `phalanx/kernels` in the user's cache folder.
pub const CACHE_VARIABLE: &str = "PHALANX_KERNEL_CACHE";

/// Where modules are looked for before they are compiled.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Store {
    given: Option<Folder>,
    cache: Option<Folder>,
}

impl Store {
    /// What [`KERNELS_VARIABLE`] names, and the cache.
    pub fn from_env() -> Self {
        Store { given: folder_in(KERNELS_VARIABLE).map(Folder::new), ..Store::cache() }
    }

    /// The cache alone.
    pub fn cache() -> Self {
        let user = || {
            let folder = folder_in("XDG_CACHE_HOME").or_else(|| Some(folder_in("HOME")?.join(".cache")))?;
            Some(folder.join("phalanx/kernels"))
        };
        Store { given: None, cache: folder_in(CACHE_VARIABLE).or_else(user).map(Folder::new) }
    }

    /// A folder in place of the cache.
    pub fn folder(path: PathBuf) -> Self {
        Store { given: None, cache: Some(Folder::new(path)) }
    }

    /// Nothing: all is compiled, and nothing is kept.
    pub fn none() -> Self {
        Store::default()
    }
}

/// Where a module was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// In the folder that was filled ahead of time.
    Given,
    /// In the cache.
    Cached,
    /// Nowhere: NVRTC made it.
    Compiled,
}

/// The kernels of one source, ready to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// The source's name.
    pub source: &'static str,
    /// What it is for.
    pub arch: Arch,
    /// A cubin, or PTX with its closing NUL ([`Arch::is_ptx`]): what `cuModuleLoadData` takes.
    pub image: Vec<u8>,
    /// Where it was found.
    pub origin: Origin,
    log: String,
}

impl Module {
    fn new(source: &Source, arch: Arch, origin: Origin, compiled: Compiled) -> Self {
        Module { source: source.name, arch, image: compiled.image, origin, log: compiled.log }
    }

    /// What its kernels take of a multiprocessor; PTX does not know it.
    pub fn usage(&self) -> Vec<KernelUsage> {
        parse_log(&self.log)
    }
}

/// What [`load`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// One module for each of [`SOURCES`], in that order.
    pub modules: Vec<Module>,
    /// Why modules were not kept for the next start, if they were not.
    pub warning: Option<String>,
}

/// The modules for `arch`; `done` is told of each, in any order and from several threads.
///
/// An NVRTC that is older than `arch` gives PTX in its place. Where there is no NVRTC, modules of the store will do whatever
/// version of it they are from: they are of these sources and options all the same.
///
/// # Errors
/// [`CompileError`] where a module is not in the store and cannot be compiled.
pub fn load(store: &Store, arch: Arch, done: &(dyn Fn(&Module) + Sync)) -> Result<Loaded, CompileError> {
    let loader = Loader { store, arch, compiler: LazyLock::new(Nvrtc::open), warning: OnceLock::new() };
    let modules = in_parallel(SOURCES, |source| loader.load(source).inspect(done));
    let modules = modules.into_iter().collect::<Result<_, CompileError>>()?;
    Ok(Loaded { modules, warning: loader.warning.into_inner() })
}

struct Loader<'a> {
    store: &'a Store,
    arch: Arch,
    /// A large library: it is not looked for where all modules are given.
    compiler: LazyLock<Result<Nvrtc, CompileError>>,
    warning: OnceLock<String>,
}

impl Loader<'_> {
    fn load(&self, source: &Source) -> Result<Module, CompileError> {
        let key = Key::new(source, HEADERS, self.arch);
        if let Some(found) = self.store.given.as_ref().and_then(|folder| folder.read_any_version(&key)) {
            return Ok(Module::new(source, self.arch, Origin::Given, found));
        }
        let cache = self.store.cache.as_ref();
        match &*self.compiler {
            Ok(nvrtc) => self.compile(nvrtc, source),
            Err(missing) => match cache.and_then(|folder| folder.read_any_version(&key)) {
                Some(found) => Ok(Module::new(source, self.arch, Origin::Cached, found)),
                None => Err(missing.clone()),
            },
        }
    }

    /// From the cache, if what NVRTC would give is there.
    fn compile(&self, nvrtc: &Nvrtc, source: &Source) -> Result<Module, CompileError> {
        let arch = if nvrtc.knows(self.arch) { self.arch } else { Arch::Compute90 };
        let key = Key::new(source, HEADERS, arch);
        let cache = self.store.cache.as_ref();
        if let Some(found) = cache.and_then(|folder| folder.read(&key, nvrtc.version())) {
            return Ok(Module::new(source, arch, Origin::Cached, found));
        }
        let compiled = nvrtc.compile(source, HEADERS, arch)?;
        if let Some(folder) = cache
            && is_code(&compiled.image)
            && let Err(error) = folder.write(&key, nvrtc.version(), &compiled)
        {
            // One such line is enough: the others would say the same.
            let folder = folder.path().display();
            self.warning.get_or_init(|| {
                format!("compiled kernels cannot be kept in {folder}, so each start compiles them: {error}")
            });
        }
        Ok(Module::new(source, arch, Origin::Compiled, compiled))
    }
}

/// Whether a GPU could take it: a cubin is an ELF file, and PTX opens with its compiler's comment. What the emulator of the tests
/// makes is neither, and must not be found later by a real driver.
fn is_code(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF") || image.starts_with(b"//")
}

/// `work` on each item, on this machine's cores; results are in the items' order.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut results = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return results };
            results.push((index, work(item)));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// The folder that a variable names; an empty one names none.
fn folder_in(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::cuda::Version;
    use crate::cuda::limits::violations;

    /// Set by CI, where a test that needs NVRTC must not pass for want of it.
    const REQUIRE_VARIABLE: &str = "PHALANX_REQUIRE_NVRTC";

    /// Whether this machine has NVRTC; says so where it has not.
    fn have_nvrtc() -> bool {
        match Nvrtc::open() {
            Ok(_) => true,
            Err(missing) => {
                assert!(env::var_os(REQUIRE_VARIABLE).is_none(), "{REQUIRE_VARIABLE} is set, but {missing}");
                eprintln!("skipped: {missing}");
                false
            }
        }
    }

    fn origins(loaded: &Loaded) -> Vec<Origin> {
        let mut origins: Vec<_> = loaded.modules.iter().map(|module| module.origin).collect();
        origins.dedup();
        origins
    }

    #[test]
    fn every_kernel_compiles_within_its_limits() {
        if !have_nvrtc() {
            return;
        }
        for arch in [Arch::Sm80, Arch::Sm90a] {
            let loaded = load(&Store::none(), arch, &|_| {}).unwrap();
            let kernels: Vec<_> = loaded.modules.iter().flat_map(Module::usage).collect();
            assert_eq!(violations(&kernels), [""; 0]);
            assert!(loaded.modules.iter().all(|module| module.image.starts_with(b"\x7fELF")));
        }
    }

    #[test]
    fn what_is_wrong_with_a_source_is_told() {
        if !have_nvrtc() {
            return;
        }
        let source =
            Source { name: "wrong.cu", text: "#include \"device.cuh\"\nKERNEL(1, 1, f, ()) { x = 1; }" };
        let error = Nvrtc::open().unwrap().compile(&source, HEADERS, Arch::Sm80).unwrap_err().to_string();
        assert!(error.contains("wrong.cu does not compile for sm_80"), "{error}");
        assert!(error.contains("wrong.cu(2): error: identifier \"x\" is undefined"), "{error}");
    }

    #[test]
    fn newer_devices_get_ptx() {
        if !have_nvrtc() {
            return;
        }
        for module in load(&Store::none(), Arch::Compute90, &|_| {}).unwrap().modules {
            let text = std::str::from_utf8(&module.image).unwrap();
            assert!(is_code(&module.image));
            assert!(text.contains(".target sm_90") && text.ends_with('\0'), "{}: not PTX", module.source);
            assert_eq!(module.usage(), []);
        }
    }

    #[test]
    fn modules_are_compiled_once() {
        if !have_nvrtc() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let store = Store::folder(folder.path().join("kernels"));
        let told = AtomicUsize::new(0);
        let count = |_: &Module| {
            told.fetch_add(1, Ordering::Relaxed);
        };
        let first = load(&store, Arch::Sm80, &count).unwrap();
        assert_eq!((origins(&first), told.into_inner()), (vec![Origin::Compiled], SOURCES.len()));
        let second = load(&store, Arch::Sm80, &|_| {}).unwrap();
        assert_eq!(origins(&second), [Origin::Cached]);
        for entry in fs::read_dir(folder.path().join("kernels")).unwrap() {
            File::options().write(true).open(entry.unwrap().path()).unwrap().set_len(100).unwrap();
        }
        assert_eq!(origins(&load(&store, Arch::Sm80, &|_| {}).unwrap()), [Origin::Compiled], "cut short");
        let given = Store { given: store.cache, cache: None };
        let third = load(&given, Arch::Sm80, &|_| {}).unwrap();
        assert_eq!(origins(&third), [Origin::Given]);
        for ((first, second), third) in first.modules.iter().zip(&second.modules).zip(&third.modules) {
            assert_eq!((&first.image, first.usage()), (&second.image, second.usage()));
            assert_eq!(second.image, third.image);
        }
    }

    #[test]
    fn without_nvrtc_modules_of_any_version_will_do() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::new(folder.path().to_owned());
        let cache = Store { given: None, cache: Some(folder.clone()) };
        let given = Store { given: Some(folder.clone()), cache: None };
        let load = |store| {
            let loader = Loader {
                store,
                arch: Arch::Sm80,
                compiler: LazyLock::new(|| Err(CompileError::NoCompiler)),
                warning: OnceLock::new(),
            };
            loader.load(&SOURCES[0]).map(|module| (module.origin, module.image))
        };
        assert_eq!(load(&cache), Err(CompileError::NoCompiler));
        assert_eq!(load(&given), Err(CompileError::NoCompiler));
        let compiled = Compiled { image: b"\x7fELF".to_vec(), log: String::new() };
        let key = Key::new(&SOURCES[0], HEADERS, Arch::Sm80);
        folder.write(&key, Version { major: 12, minor: 9 }, &compiled).unwrap();
        assert_eq!(load(&cache), Ok((Origin::Cached, compiled.image.clone())));
        assert_eq!(load(&given), Ok((Origin::Given, compiled.image)));
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_a_warning() {
        if !have_nvrtc() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let loaded = load(&Store::folder(file.path().join("below")), Arch::Sm80, &|_| {}).unwrap();
        assert_eq!(origins(&loaded), [Origin::Compiled]);
        assert!(loaded.warning.is_some_and(|warning| warning.contains("below")));
    }

    #[test]
    fn results_keep_the_order_of_their_items() {
        let items: Vec<usize> = (0..100).collect();
        assert_eq!(
            in_parallel(&items, |item| item * 2),
            items.iter().map(|item| item * 2).collect::<Vec<_>>()
        );
        assert!(in_parallel(&[], |item: &usize| *item).is_empty());
    }
}
