//! One GPU as one thread drives it: its context, a stream that everything runs on, and the kernels.

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::NoUninit;
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};

use crate::{Error, Result};

/// The first driver that has every function that this program calls, and runs what NVRTC 13 compiles.
const DRIVER_VERSION: i32 = 13_000;
/// The first GPUs, by capability, that begin kernels early.
const EARLY_CAPABILITY: u32 = 9;
/// Dynamic shared memory that a kernel may use without having asked for it.
const PLAIN_SHARED_BYTES: u32 = 48 * 1024;
/// How long a watched wait asks without pause, and how long it pauses then.
const AWAKE: Duration = Duration::from_micros(100);
const NAP: Duration = Duration::from_micros(20);

/// A GPU. Not `Send`: the thread that opened it drives it.
pub(crate) struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: RefCell<Vec<Arc<CudaModule>>>,
    /// Those that were launched before.
    kernels: RefCell<HashMap<&'static str, Kernel>>,
    multiprocessors: u32,
    shared_limit: u32,
    /// Whether a kernel's blocks may come before those of the kernel before it have ended.
    begins_early: bool,
    /// Bytes that are allocated, by what for.
    allocated: RefCell<BTreeMap<&'static str, u64>>,
    /// What looks after this thread's dealings with others while it waits.
    watcher: RefCell<Option<Box<dyn FnMut()>>>,
}

#[derive(Debug)]
struct Kernel {
    function: CudaFunction,
    /// Dynamic shared memory that it was allowed.
    shared_bytes: u32,
    /// Blocks that a multiprocessor has room for, by threads and dynamic shared memory.
    resident: HashMap<(u32, u32), u32>,
}

/// Blocks of a launch, threads of a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: (u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

impl Device {
    /// Opens GPU number `ordinal`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no driver, no such GPU, or too old a driver: in a sentence for users.
    pub(crate) fn open(ordinal: usize) -> Result<Rc<Self>> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::Unsupported(format!("there is no GPU {ordinal}: this machine has {count}")));
        }
        let opening = || format!("opening GPU {ordinal}");
        let context = CudaContext::new(ordinal).map_err(|e| failed(opening(), e))?;
        // SAFETY: one stream orders all work, so no event is needed between two uses of a buffer.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|e| failed(opening(), e))?;
        let attribute = |attribute| {
            let value = context.attribute(attribute).map_err(|e| failed(opening(), e))?;
            Ok::<_, Error>(u32::try_from(value).unwrap_or_default())
        };
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1);
        let shared_limit =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let begins_early =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? >= EARLY_CAPABILITY;
        Ok(Rc::new(Self {
            context,
            stream,
            modules: RefCell::default(),
            kernels: RefCell::default(),
            multiprocessors,
            shared_limit,
            begins_early,
            allocated: RefCell::default(),
            watcher: RefCell::default(),
        }))
    }

    /// GPUs of this machine, at least one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no driver, too old a driver, or no GPU: in a sentence for users.
    pub(crate) fn count() -> Result<usize> {
        // SAFETY: looks whether a library can be opened, and opens it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unsupported(
                "no GPU can be used: NVIDIA's driver (libcuda.so.1) is not installed on this machine; install it, or \
                 run with --device cpu"
                    .into(),
            ));
        }
        let unusable =
            |error: DriverError| Error::Unsupported(format!("no GPU can be used: {}", reason(error)));
        result::init().map_err(unusable)?;
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(unusable)?;
        if version < DRIVER_VERSION {
            let shown = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            return Err(Error::Unsupported(format!(
                "NVIDIA's driver here is made for CUDA {}; CUDA {} (driver 580) or newer is needed",
                shown(version),
                shown(DRIVER_VERSION)
            )));
        }
        match result::device::get_count().map_err(unusable)? {
            count @ 1.. => Ok(count.unsigned_abs() as usize),
            _ => Err(Error::Unsupported("this machine has no GPU: run with --device cpu".into())),
        }
    }

    /// Its compute capability, for example (9, 0).
    pub(crate) fn capability(&self) -> Result<(i32, i32)> {
        self.context.compute_capability().map_err(|e| failed("reading the GPU's properties", e))
    }

    /// Its name, as its maker gave it.
    pub(crate) fn name(&self) -> Result<String> {
        self.context.name().map_err(|e| failed("reading the GPU's properties", e))
    }

    /// What tells it from all other GPUs; a part of a GPU (MIG) has one of its own.
    pub(crate) fn uuid(&self) -> Result<[u8; 16]> {
        let uuid = result::device::get_uuid(self.context.cu_device());
        Ok(uuid.map_err(|e| failed("reading the GPU's properties", e))?.bytes.map(|byte| byte as u8))
    }

    /// Multiprocessors.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of shared memory that a block may have.
    pub(crate) fn shared_limit(&self) -> u32 {
        self.shared_limit
    }

    /// Notes that `bytes` bytes were allocated for `what`.
    pub(crate) fn note_allocated(&self, what: &'static str, bytes: usize) {
        *self.allocated.borrow_mut().entry(what).or_default() += bytes as u64;
    }

    /// Notes that they were given back.
    pub(crate) fn note_freed(&self, what: &'static str, bytes: usize) {
        if let Some(allocated) = self.allocated.borrow_mut().get_mut(what) {
            *allocated -= bytes as u64;
        }
    }

    /// Bytes that are allocated, by what for.
    pub(crate) fn allocated(&self) -> BTreeMap<&'static str, u64> {
        self.allocated.borrow().clone()
    }

    /// Bytes of memory that are free, and that there are.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) =
            self.context.mem_get_info().map_err(|e| failed("reading the GPU's free memory", e))?;
        Ok((free as u64, total as u64))
    }

    /// The stream that everything runs on.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Makes this device the calling thread's current one.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| failed("choosing the GPU", e))
    }

    /// Its context, which threads may share.
    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// From now on calls `look` again and again while this thread waits for the device.
    pub(crate) fn while_waiting(&self, look: Box<dyn FnMut()>) {
        *self.watcher.borrow_mut() = Some(look);
    }

    /// Waits until everything that was begun has ended.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let waiting = |e| failed("waiting for the GPU", e);
        if self.watcher.borrow().is_none() {
            return self.stream.synchronize().map_err(waiting);
        }
        self.wait(&self.stream.record_event(None).map_err(waiting)?)
    }

    /// Likewise, as long as `go_on` says so: whether it has ended.
    pub(crate) fn synchronize_while(&self, go_on: &mut dyn FnMut() -> bool) -> Result<bool> {
        let ended = self.stream.record_event(None).map_err(|e| failed("waiting for the GPU", e))?;
        wait_while(&ended, go_on)
    }

    /// Waits until the device has come to `event`.
    pub(crate) fn wait(&self, event: &CudaEvent) -> Result<()> {
        // Taken out, so that it may wait itself.
        let Some(mut look) = self.watcher.take() else {
            return event.synchronize().map_err(|e| failed("waiting for the GPU", e));
        };
        let result = wait_while(event, &mut || {
            look();
            true
        });
        self.watcher.replace(Some(look));
        result.map(drop)
    }

    /// Whether the device has come to `event`; whoever asks waits for it.
    pub(crate) fn has_come_to(&self, event: &CudaEvent) -> Result<bool> {
        if let Some(mut look) = self.watcher.take() {
            look();
            self.watcher.replace(Some(look));
        }
        event.try_is_complete().map_err(|e| failed("waiting for the GPU", e))
    }

    /// Loads a compiled file of kernels.
    pub(crate) fn load(&self, image: &[u8]) -> Result<()> {
        let image = cudarc::nvrtc::Ptx::from_binary(image.to_vec());
        let module = self.context.load_module(image).map_err(|e| failed("loading kernels", e))?;
        self.modules.borrow_mut().push(module);
        Ok(())
    }

    /// Begins a kernel. An empty grid begins nothing.
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, and what they point to is as large as it says.
    pub(crate) unsafe fn launch(
        &self,
        name: &'static str,
        launch: Launch,
        arguments: Arguments,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.begin(name, launch, arguments, &mut []) }
    }

    /// Begins a kernel that waits for those before it by itself, by `after_previous` of device.cuh: where the GPU can, its blocks
    /// come while the last ones before them end (programmatic dependent launch; CUDA C++ Programming Guide).
    ///
    /// # Safety
    /// As for `launch`; and the kernel calls `after_previous`.
    pub(crate) unsafe fn launch_early(
        &self,
        name: &'static str,
        launch: Launch,
        arguments: Arguments,
    ) -> Result<()> {
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let attributes = if self.begins_early { std::slice::from_mut(&mut early) } else { &mut [] };
        // SAFETY: the caller's promise.
        unsafe { self.begin(name, launch, arguments, attributes) }
    }

    /// # Safety
    /// As for `launch` and, with its attribute, `launch_early`.
    unsafe fn begin(
        &self,
        name: &'static str,
        Launch { grid, threads, shared_bytes }: Launch,
        mut arguments: Arguments,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        self.with_kernel(name, shared_bytes, |kernel| {
            let config = sys::CUlaunchConfig {
                gridDimX: grid.0,
                gridDimY: grid.1,
                gridDimZ: 1,
                blockDimX: threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shared_bytes,
                hStream: self.stream.cu_stream(),
                attrs: attributes.as_mut_ptr(),
                numAttrs: attributes.len() as u32,
            };
            let (function, mut pointers) = (kernel.function.cu_function(), arguments.pointers());
            // SAFETY: the caller's promise; function and stream are of one context; no attribute outlives the call.
            unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    function,
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
            .result()
        })
    }

    /// Blocks of a kernel that the GPU works on at once, at least one: the grid for kernels whose blocks stay.
    pub(crate) fn resident_blocks(&self, name: &'static str, threads: u32, shared_bytes: u32) -> Result<u32> {
        let resident = self.with_kernel(name, shared_bytes, |kernel| {
            if let Some(&known) = kernel.resident.get(&(threads, shared_bytes)) {
                return Ok(known);
            }
            let bytes = shared_bytes as usize;
            let found =
                kernel.function.occupancy_max_active_blocks_per_multiprocessor(threads, bytes, None)?;
            kernel.resident.insert((threads, shared_bytes), found);
            Ok(found)
        })?;
        Ok(resident.max(1) * self.multiprocessors)
    }

    /// Does something with a kernel that may use so much dynamic shared memory.
    fn with_kernel<T>(
        &self,
        name: &'static str,
        shared_bytes: u32,
        act: impl FnOnce(&mut Kernel) -> std::result::Result<T, DriverError>,
    ) -> Result<T> {
        let mut kernels = self.kernels.borrow_mut();
        let kernel = match kernels.entry(name) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => {
                let modules = self.modules.borrow();
                let function = modules.iter().find_map(|module| module.load_function(name).ok());
                let function = function.ok_or_else(|| Error::Device {
                    what: format!("the kernel {name}"),
                    why: "no compiled file has it".into(),
                })?;
                let resident = HashMap::default();
                vacant.insert(Kernel { function, shared_bytes: PLAIN_SHARED_BYTES, resident })
            }
        };
        let failed = |error| failed(format!("the kernel {name}"), error);
        if shared_bytes > kernel.shared_bytes {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            kernel.function.set_attribute(attribute, bytes).map_err(failed)?;
            kernel.shared_bytes = shared_bytes;
        }
        act(kernel).map_err(failed)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("ordinal", &self.context.ordinal()).finish_non_exhaustive()
    }
}

/// Waits until the device has come to `event`, as long as `go_on` says so: whether it has.
fn wait_while(event: &CudaEvent, go_on: &mut dyn FnMut() -> bool) -> Result<bool> {
    let begun = Instant::now();
    while !event.try_is_complete().map_err(|e| failed("waiting for the GPU", e))? {
        if !go_on() {
            return Ok(false);
        }
        if begun.elapsed() < AWAKE {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
    Ok(true)
}

/// A kernel's arguments, copied one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    /// Of the largest alignment that an argument can have.
    words: Vec<u128>,
    /// Where each argument begins, in words.
    starts: Vec<usize>,
}

impl Arguments {
    /// Appends an argument: a pointer as `u64`, a number, or a `repr(C)` struct.
    pub(crate) fn with<T: NoUninit>(mut self, value: T) -> Self {
        let bytes = bytemuck::bytes_of(&value);
        let start = self.words.len();
        self.starts.push(start);
        self.words.resize(start + bytes.len().div_ceil(size_of::<u128>()), 0);
        bytemuck::cast_slice_mut(&mut self.words[start..])[..bytes.len()].copy_from_slice(bytes);
        self
    }

    fn pointers(&mut self) -> Vec<*mut c_void> {
        let words = &mut self.words;
        self.starts.iter().map(|&start| (&raw mut words[start]).cast()).collect()
    }
}

/// A failure of the driver.
pub(crate) fn failed(what: impl Into<String>, error: DriverError) -> Error {
    Error::Device { what: what.into(), why: reason(error) }
}

/// The driver's words.
fn reason(error: DriverError) -> String {
    let text = |found: std::result::Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}
