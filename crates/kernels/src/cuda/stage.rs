//! Sums and columns without a network of the device's own: through page-locked memory of the host, or, for a rank that is alone,
//! within the device.

use std::rc::Rc;

use super::Cuda;
use super::buffer::Buffer;
use super::device::{Device, failed};
use super::fold::{FoldProgram, Outputs, Parts, fold, place_columns};
use super::memory::Pinned;
use crate::{Error, Partial, Result, Tree};

/// Elements of f32 in page-locked memory, on their way between the device and what computes on the host.
#[derive(Debug)]
pub struct Stage {
    device: Rc<Device>,
    memory: Option<Pinned>,
}

impl Stage {
    /// An empty one.
    pub fn new(cuda: &Cuda) -> Self {
        Self { device: cuda.device().clone(), memory: None }
    }

    /// The first `len` elements, of whatever was there.
    pub fn floats(&mut self, len: usize) -> Result<&mut [f32]> {
        let bytes = len * size_of::<f32>();
        if self.memory.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.memory = None;
            self.memory = Some(Pinned::allocate(&self.device, bytes.next_power_of_two())?);
        }
        Ok(self.memory.as_mut().map_or(&mut [], |memory| &mut memory.floats()[..len]))
    }

    /// The first `len` elements of each of the f32 `buffers`, one behind the other, when all that was begun before has ended.
    pub fn load<'b>(
        &mut self,
        buffers: impl ExactSizeIterator<Item = &'b Buffer>,
        len: usize,
    ) -> Result<&[f32]> {
        let device = self.device.clone();
        let count = buffers.len();
        let target = self.floats(count * len)?;
        for (part, buffer) in target.chunks_exact_mut(len.max(1)).zip(buffers) {
            let source = buffer.floats("load", &device, len)?;
            // SAFETY: both have as many elements; the device is waited for before anybody reads the target.
            unsafe { cudarc::driver::result::memcpy_dtoh_async(part, source, device.stream().cu_stream()) }
                .map_err(|e| failed("copying from the GPU", e))?;
        }
        device.synchronize()?;
        Ok(target)
    }

    /// Copies the first `len` elements to `buffer`; returns when they are there.
    pub fn store(&mut self, len: usize, buffer: &mut Buffer) -> Result<()> {
        let device = self.device.clone();
        let target = buffer.floats("store", &device, len)?;
        let source = self.floats(len)?;
        // SAFETY: both have as many elements; the device is waited for before anybody writes the source.
        unsafe { cudarc::driver::result::memcpy_htod_async(target, source, device.stream().cu_stream()) }
            .map_err(|e| failed("copying to the GPU", e))?;
        device.synchronize()
    }
}

/// Begins to add the sums of a rank that holds all units: `partials` are the sub-trees, of each the first `len` elements; `out` is
/// f32 of at least `len` elements.
///
/// # Errors
/// [`Error::Shape`] where the sub-trees do not tile the tree, or a buffer is too short.
pub fn reduce_alone(tree: Tree, len: usize, partials: &[Partial<Buffer>], out: &mut Buffer) -> Result<()> {
    const OP: &str = "tree_reduce";
    let device = out.device().clone();
    let leaves: Vec<_> = partials.iter().map(|partial| partial.units.clone()).collect();
    let whole = 0..tree.units;
    let program = FoldProgram::new(&leaves, std::slice::from_ref(&whole))?;
    let parts = partials.iter().map(|partial| partial.sum.floats(OP, &device, len));
    let parts = Parts::new(parts.collect::<Result<Vec<u64>>>()?.into_iter());
    let outputs = Outputs::new(std::iter::once(out.floats(OP, &device, len)?));
    // SAFETY: the sizes were checked; allocations begin on a multiple of 256 bytes.
    unsafe { fold(&device, parts, program, outputs, len) }
}

/// Begins to copy f32 `[rows, count]`.
///
/// # Errors
/// [`Error::Shape`] where a buffer is too short.
pub fn copy_alone(rows: usize, count: usize, x: &Buffer, out: &mut Buffer) -> Result<()> {
    const OP: &str = "gather";
    let device = out.device().clone();
    let len = rows * count;
    let (x, out) = (x.floats(OP, &device, len)?, out.floats(OP, &device, len)?);
    if i32::try_from(len).is_err() {
        return Err(Error::Shape { op: OP, detail: format!("{rows} rows of {count} columns") });
    }
    // SAFETY: the sizes were checked.
    unsafe { place_columns(&device, x, (rows, count), out, (0, count)) }
}
