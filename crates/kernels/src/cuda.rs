//! The CUDA backend: kernels of our own, compiled at start-up, on one GPU that one thread drives.
//!
//! Activations and weights are bf16, sums and the residual stream f32. Each op is a `.cu` file next to the Rust that launches it.
//! A step's plan is sent once (`step`, `transfer`); decoding steps are recorded as CUDA graphs (`record`). Under
//! `deterministic` every product is by our kernels, which sum in one order for any number of rows; else cuBLASLt does the wide ones.

mod arch;
mod arena;
mod attend;
mod backend;
mod blas;
mod board;
mod buffer;
mod cache;
mod ceilings;
mod device;
mod elementwise;
mod fold;
mod libraries;
mod limits;
mod linear;
mod mailbox;
mod matrix;
mod memory;
mod modules;
mod moment;
mod nccl;
mod nvrtc;
mod one_shot;
mod pack;
mod record;
mod report;
mod rope;
mod sample;
mod sources;
mod stage;
mod step;
mod tiles;
mod transfer;
mod usage;
mod wide;

use std::cell::RefCell;
use std::rc::Rc;

pub use self::arch::Arch;
pub use self::board::{Board, Missed};
pub use self::buffer::{Buffer, KvCache, Table};
pub use self::ceilings::Ceilings;
pub use self::libraries::libraries;
pub use self::limits::violations;
pub use self::mailbox::Mailbox;
pub use self::matrix::Matrix;
pub use self::modules::{CACHE_VARIABLE, KERNELS_VARIABLE, Loaded, Module, Origin, Store, load};
pub use self::moment::Moment;
pub use self::nccl::{Communicator, NcclId, Outbox, nccl_version};
pub use self::nvrtc::{CompileError, Nvrtc, Version};
pub use self::one_shot::{MAX_RANKS, OneShot};
pub use self::report::MemoryReport;
pub use self::sources::{HEADERS, SOURCES, Source};
pub use self::stage::{Stage, copy_alone, reduce_alone};
pub use self::usage::KernelUsage;

use self::arena::Arena;
use self::device::Device;
use self::linear::{Products, SUMS_BYTES};
use self::memory::{Memory, Scratch};
use self::pack::Packer;
use self::record::{Record, Records};
use self::step::{LARGEST_BUCKET, Plan};
use self::transfer::{Choices, Words};
use self::wide::{WIDE_ROWS, Wide};
use crate::{CudaOptions, Error, MAX_SLOTS, Result, Step, WeightFormat};

/// Small weights share allocations of this size, so that few bytes are lost to the driver's pages.
const ARENA_SHARED_BYTES: usize = 64 << 20;
/// What the driver, graphs and work space take beyond what is accounted for.
const RESERVE_BYTES: u64 = 512 << 20;

// What wide products use is neither ready for a recording nor kept for it.
const _: () = assert!(LARGEST_BUCKET < WIDE_ROWS, "steps that are recorded must not be wide");

/// GPUs of this machine, at least one.
pub(crate) fn count() -> Result<usize> {
    Device::count()
}

/// One GPU.
pub struct Cuda {
    warning: Option<String>,
    device: Rc<Device>,
    options: CudaOptions,
    arch: Arch,
    path: String,
    arena: Arena,
    /// Where weights lie as the checkpoint has them before they are packed.
    staging: RefCell<Scratch>,
    /// Unless bits must not depend on the number of rows.
    wide: Option<Wide>,
    /// Query heads of a unit, which decide how a step is cut into work, and blocks of the cache.
    group: usize,
    kv_blocks: usize,
    words: Words,
    choices: Choices,
    /// The step that ops are called for.
    plan: Option<Plan>,
    /// Where they leave the tokens that they choose, if they do.
    chosen: Option<u64>,
    /// Ids by slot, as they were last kept.
    last_sampled: Memory,
    /// Whoever was recorded may have them forgotten.
    records: Rc<RefCell<Records>>,
    /// Sums of units, and partial results of attention.
    products: Scratch,
    attention: RefCell<Scratch>,
    /// Spans of keys that the second has room for in any recorded step.
    recorded_spans: usize,
    frequencies: rope::Frequencies,
}

impl Cuda {
    /// Opens a GPU and loads its kernels, which are compiled first where that was not done before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where a library or a GPU is missing or too old: in a sentence for users.
    pub fn open(options: CudaOptions) -> Result<Self> {
        Self::with_kernels(options, &Store::from_env())
    }

    /// Likewise, with kernels kept elsewhere.
    ///
    /// # Errors
    /// As [`Cuda::open`].
    pub fn with_kernels(options: CudaOptions, store: &Store) -> Result<Self> {
        let device = Device::open(options.ordinal)?;
        let (major, minor) = device.capability()?;
        let arch = Arch::for_device(major, minor)?;
        let loaded = load(store, arch, &|_| {}).map_err(|error| Error::Unsupported(error.to_string()))?;
        for module in &loaded.modules {
            device.load(&module.image)?;
        }
        let wide =
            if options.deterministic { None } else { Some(Wide::open(&device, options.unpacked_bytes)?) };
        let shared = if options.separate_allocations { 0 } else { ARENA_SHARED_BYTES };
        Ok(Self {
            warning: loaded.warning,
            path: path(arch, &options),
            arch,
            arena: Arena::new(&device, shared)?,
            staging: RefCell::new(Scratch::new(&device)),
            wide,
            group: 1,
            kv_blocks: usize::MAX,
            words: Words::new(&device)?,
            choices: Choices::new(&device)?,
            plan: None,
            chosen: None,
            last_sampled: last_sampled(&device)?,
            records: Rc::default(),
            products: Scratch::new(&device),
            attention: RefCell::new(Scratch::new(&device)),
            recorded_spans: 0,
            frequencies: rope::Frequencies::default(),
            device,
            options,
        })
    }

    /// Switches [`CudaOptions::deterministic`] without loading weights anew, for measuring what it costs. What was computed before
    /// stays; the path, and so the fingerprint, is the other one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without cuBLASLt, [`Error::OutOfMemory`] without room for its work space; then nothing has changed.
    pub fn set_deterministic(&mut self, deterministic: bool) -> Result<()> {
        if deterministic == self.options.deterministic {
            return Ok(());
        }
        let wide = if deterministic {
            None
        } else {
            let mut wide = Wide::open(&self.device, self.options.unpacked_bytes)?;
            wide.reserve()?;
            Some(wide)
        };
        self.wide = wide;
        self.options.deterministic = deterministic;
        self.path = path(self.arch, &self.options);
        Ok(())
    }

    /// The GPU's name, as its maker gave it.
    pub fn name(&self) -> Result<String> {
        self.device.name()
    }

    /// What tells this GPU (or part of one) from all others.
    pub fn uuid(&self) -> Result<[u8; 16]> {
        self.device.uuid()
    }

    /// Bytes of the GPU's memory that are free, and that there are.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    /// What went wrong at the start without doing harm, if anything did.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Where the GPU's memory went.
    pub fn memory_report(&self) -> Result<MemoryReport> {
        MemoryReport::new(&self.device, self.kv_blocks)
    }

    /// Waits until everything that was begun has ended.
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// From now on calls `look` again and again while this thread waits for the GPU: a rank that waits for others looks there
    /// after those that could keep it waiting for ever.
    pub fn while_waiting(&self, look: impl FnMut() + 'static) {
        self.device.while_waiting(Box::new(look));
    }

    pub(crate) fn device(&self) -> &Rc<Device> {
        &self.device
    }

    pub(crate) fn records(&self) -> &Rc<RefCell<Records>> {
        &self.records
    }

    fn products(&mut self) -> Products<'_> {
        Products { device: &self.device, scratch: &mut self.products, wide: self.wide.as_mut() }
    }

    fn packer(&self) -> Packer<'_> {
        Packer { arena: &self.arena, staging: &self.staging }
    }

    /// Takes the work space of products, so that it cannot be missing in a step.
    fn reserve_work_space(&mut self) -> Result<()> {
        self.products.reserve(SUMS_BYTES)?;
        self.wide.as_mut().map_or(Ok(()), Wide::reserve)
    }

    /// Bytes that this would take.
    fn missing_work_space(&self) -> u64 {
        let wide = self.wide.as_ref().map_or(0, Wide::missing_bytes);
        (SUMS_BYTES.saturating_sub(self.products.bytes()) + wide) as u64
    }

    /// The plan of the step that runs.
    fn plan(&self, op: &'static str, step: &Step) -> Result<&Plan> {
        match &self.plan {
            Some(plan) if plan.sizes.rows == step.rows && plan.sizes.sampled == step.sampled_rows => Ok(plan),
            _ => Err(Error::Shape { op, detail: "called outside of the step's run".into() }),
        }
    }

    /// Where a part of the running step's words lies on the device.
    fn word(&self, part: usize) -> u64 {
        self.words.pointer() + 4 * part as u64
    }

    /// Records the ops that `body` calls.
    fn record<E: From<Error>>(
        &mut self,
        body: &mut impl FnMut(&mut Self) -> std::result::Result<(), E>,
    ) -> std::result::Result<Record, E> {
        record::begin(&self.device)?;
        let called = body(self);
        let graph = record::end(&self.device);
        called?;
        Ok(Record::new(graph?, self.chosen.take()))
    }
}

/// Room for an id of every slot, none of which was kept yet.
fn last_sampled(device: &Rc<Device>) -> Result<Memory> {
    Memory::zeroed(device, "ids by slot", MAX_SLOTS * size_of::<u32>())
}

/// The instruction path: what bits depend on beside the model.
fn path(arch: Arch, options: &CudaOptions) -> String {
    let weights = if options.weights == WeightFormat::Fp8 { "-fp8" } else { "" };
    let kind = if options.deterministic { "-deterministic" } else { "" };
    format!("cuda-{arch}{weights}{kind}")
}
