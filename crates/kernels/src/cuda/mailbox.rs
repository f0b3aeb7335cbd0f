//! What a rank sends to others: memory of its device that they read, as threads of this process or as processes of this machine.
//!
//! The memory is made and mapped in steps of the driver's own (virtual memory management), and shared as a file descriptor: each process
//! holds it by itself, so it stays whole when the process that made it dies. (Of the older `cuIpc` handles that is not promised.)

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUmemAccess_flags, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationType, CUmemLocation, CUmemLocationType,
};
use cudarc::driver::{CudaContext, DriverError, result};

use super::Cuda;
use super::device::{Device, failed};
use super::one_shot::{LETTERS_BYTE, MAILBOX_BYTES};
use crate::{Error, Result};

const FILE: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// What a rank sends, in its device's memory (`one_shot.cu` says how it is laid out). All ranks of a group hold all mailboxes.
#[derive(Debug)]
pub struct Mailbox {
    /// The device that it was mapped for.
    context: Arc<CudaContext>,
    handle: sys::CUmemGenericAllocationHandle,
    /// 0 before addresses were reserved.
    pointer: u64,
    bytes: usize,
    mapped: bool,
}

impl Mailbox {
    /// An empty one in this GPU's memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the GPU's memory cannot be shared, [`Error::OutOfMemory`] where it is full.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        let device = cuda.device();
        let (properties, bytes) = layout(device)?;
        let mut handle = 0;
        // SAFETY: asks for memory, which `drop` gives back.
        unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0) }.result().map_err(
            |error| match error {
                DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                    Error::OutOfMemory { what: "a mailbox", bytes }
                }
                other => failed("making a mailbox", other),
            },
        )?;
        let mailbox = Self::map(device, handle, bytes)?;
        // SAFETY: the memory is that long.
        unsafe { result::memset_d8_async(mailbox.pointer, 0, LETTERS_BYTE, device.stream().cu_stream()) }
            .map_err(|e| failed("clearing a mailbox", e))?;
        // Before any rank looks into it.
        device.synchronize()?;
        Ok(mailbox)
    }

    /// One that another process (or thread) made and [exported](Self::export), for this GPU to read.
    ///
    /// # Errors
    /// [`Error::Device`] where `file` is not such memory, or this GPU cannot read it.
    pub fn import(cuda: &Cuda, file: BorrowedFd<'_>) -> Result<Self> {
        let device = cuda.device();
        let (_, bytes) = layout(device)?;
        let mut handle = 0;
        let number = file.as_raw_fd() as usize as *mut _;
        // SAFETY: the driver takes the descriptor's number in place of a pointer, and keeps none of it.
        unsafe { sys::cuMemImportFromShareableHandle(&raw mut handle, number, FILE) }
            .result()
            .map_err(|e| failed("taking a mailbox of another process", e))?;
        Self::map(device, handle, bytes)
    }

    /// A descriptor by which others [import](Self::import) it.
    ///
    /// # Errors
    /// [`Error::Device`] in the driver's words.
    pub fn export(&self) -> Result<OwnedFd> {
        let mut file: i32 = -1;
        // SAFETY: writes one integer, a new descriptor of this process.
        unsafe { sys::cuMemExportToShareableHandle((&raw mut file).cast(), self.handle, FILE, 0) }
            .result()
            .map_err(|e| failed("sharing a mailbox", e))?;
        // SAFETY: just made, and known to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(file) })
    }

    /// Its address, on this process's devices that it is open to.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Lets another device of this process read it.
    pub(crate) fn open_to(&self, device: &Device) -> Result<()> {
        let (own, other) = (device.context(), &self.context);
        if own.ordinal() == other.ordinal() {
            return Ok(());
        }
        let mut possible = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut possible, own.cu_device(), other.cu_device()) }
            .result()
            .map_err(|e| failed("asking about another GPU", e))?;
        if possible == 0 {
            return Err(Error::Unsupported(format!(
                "GPU {} cannot read the memory of GPU {}: use NCCL, or collectives over the host",
                own.ordinal(),
                other.ordinal()
            )));
        }
        self.allow(device)
    }

    /// Gives memory an address that `device` may use. Takes the handle over.
    fn map(device: &Device, handle: sys::CUmemGenericAllocationHandle, bytes: usize) -> Result<Self> {
        let context = device.context().clone();
        // From now on `drop` gives back what there is.
        let mut mailbox = Self { context, handle, pointer: 0, bytes, mapped: false };
        let mapping = |e| failed("mapping a mailbox", e);
        device.bind()?;
        // SAFETY: asks for addresses, which nobody else has then.
        unsafe { sys::cuMemAddressReserve(&raw mut mailbox.pointer, bytes, 0, 0, 0) }
            .result()
            .map_err(mapping)?;
        // SAFETY: at addresses that were just reserved.
        unsafe { sys::cuMemMap(mailbox.pointer, bytes, 0, handle, 0) }.result().map_err(mapping)?;
        mailbox.mapped = true;
        mailbox.allow(device)?;
        Ok(mailbox)
    }

    fn allow(&self, device: &Device) -> Result<()> {
        let access = sys::CUmemAccessDesc {
            location: location(device),
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: of the whole mapping.
        unsafe { sys::cuMemSetAccess(self.pointer, self.bytes, &raw const access, 1) }
            .result()
            .map_err(|e| failed(format!("opening a mailbox to GPU {}", device.context().ordinal()), e))
    }
}

/// What a mailbox is made of, and its bytes.
fn layout(device: &Device) -> Result<(CUmemAllocationProp, usize)> {
    let supported = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
    let asking = |e| failed("reading the GPU's properties", e);
    if device.context().attribute(supported).map_err(asking)? == 0 {
        let ordinal = device.context().ordinal();
        return Err(Error::Unsupported(format!("GPU {ordinal} cannot share memory between processes")));
    }
    let properties = CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: FILE,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    };
    let minimum = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    let mut granularity = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuMemGetAllocationGranularity(&raw mut granularity, &raw const properties, minimum) }
        .result()
        .map_err(asking)?;
    Ok((properties, MAILBOX_BYTES.next_multiple_of(granularity.max(1))))
}

fn location(device: &Device) -> CUmemLocation {
    CUmemLocation {
        type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: device.context().ordinal() as i32,
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: each was made by this, and undone in the opposite order. Every rank that knew the address has waited for its kernels.
        unsafe {
            if self.mapped {
                let _ = sys::cuMemUnmap(self.pointer, self.bytes);
            }
            if self.pointer != 0 {
                let _ = sys::cuMemAddressFree(self.pointer, self.bytes);
            }
            let _ = sys::cuMemRelease(self.handle);
        }
    }
}
