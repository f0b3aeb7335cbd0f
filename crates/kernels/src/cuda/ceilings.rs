//! What a GPU reaches at best: reading and copying its memory, and one large product by cuBLASLt. Speeds are told as parts of these.

use std::rc::Rc;

use half::bf16;

use super::Cuda;
use super::blas::{Blas, Size};
use super::device::{Arguments, Device, Launch, failed};
use super::memory::Memory;
use super::moment::Moment;
use crate::{DType, Error, Result};

const THREADS: usize = 256;
/// Blocks of `read_memory` that a multiprocessor works on at once.
const BLOCKS: usize = 4;
/// Bytes of a piece that it reads.
const PIECE_BYTES: usize = 16;
/// Random numbers that memory is filled with, again and again.
const PATTERN_BYTES: usize = 4 << 20;
/// Products of a measurement, so that the time between two of them does not count.
const PRODUCTS: usize = 20;
const WHAT: &str = "a measurement of speed";

/// Memory of a GPU to measure on. All of it holds random numbers: a GPU draws less power, and runs faster, on zeros.
pub struct Ceilings {
    device: Rc<Device>,
    /// What is read, copied, and multiplied.
    source: Memory,
    /// What is written.
    target: Memory,
    /// Bytes that are read or copied.
    bytes: usize,
    /// Rows and columns of the matrices.
    size: usize,
    blas: Blas,
}

impl Ceilings {
    /// Takes twice `bytes` bytes of memory, far more than caches hold, and at least what three matrices of `size`² take. Reads it once
    /// and checks that nothing was left out.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Unsupported`] without cuBLASLt; [`Error::Shape`] for a size that it does not multiply.
    pub fn new(cuda: &Cuda, bytes: usize, size: usize) -> Result<Self> {
        let device = cuda.device();
        if size == 0 || !size.is_multiple_of(16) || bytes < PIECE_BYTES {
            let detail = format!("{bytes} bytes and matrices of {size}²: 16 or a multiple of it is taken");
            return Err(Error::Shape { op: "ceilings", detail });
        }
        let bytes = bytes / PIECE_BYTES * PIECE_BYTES;
        let matrix = size * size * DType::Bf16.size();
        let ceilings = Self {
            source: Memory::allocate(device, WHAT, bytes.max(2 * matrix))?,
            target: Memory::allocate(device, WHAT, bytes.max(matrix))?,
            blas: Blas::open(device)?,
            device: device.clone(),
            bytes,
            size,
        };
        let pattern = pattern();
        for first in (0..ceilings.source.bytes()).step_by(pattern.len()) {
            let len = pattern.len().min(ceilings.source.bytes() - first);
            ceilings.source.write(first, &pattern[..len])?;
        }
        ceilings.check_reading(&pattern)?;
        Ok(ceilings)
    }

    /// Gigabytes that kernels read a second.
    pub fn read(&mut self) -> Result<f64> {
        let seconds = self.seconds(|this| this.begin_reading().map(drop))?;
        Ok(self.bytes as f64 / seconds / 1e9)
    }

    /// Gigabytes that the driver copies a second from memory to memory, those read and those written counted together.
    pub fn copy(&mut self) -> Result<f64> {
        let seconds = self.seconds(|this| {
            let (to, from, stream) =
                (this.target.pointer(), this.source.pointer(), this.device.stream().cu_stream());
            // SAFETY: both allocations hold so many bytes.
            unsafe { cudarc::driver::result::memcpy_dtod_async(to, from, this.bytes, stream) }
                .map_err(|e| failed("copying on the GPU", e))
        })?;
        Ok(2.0 * self.bytes as f64 / seconds / 1e9)
    }

    /// 10¹² operations that cuBLASLt does a second in products of square bf16 matrices, 2 · size³ in each.
    pub fn multiply(&mut self) -> Result<f64> {
        let n = self.size;
        let size =
            Size { rows: n, n, k: n, x_stride: n, weight_stride: n, out_stride: n, out_dtype: DType::Bf16 };
        let seconds = self.seconds(|this| {
            let x = this.source.pointer();
            let weight = x + (n * n * DType::Bf16.size()) as u64;
            for _ in 0..PRODUCTS {
                // SAFETY: the source holds two such matrices, the target one; n is a multiple of 16.
                unsafe { this.blas.multiply(size, x, weight, this.target.pointer()) }?;
            }
            Ok(())
        })?;
        Ok((PRODUCTS * 2) as f64 * (n as f64).powi(3) / seconds / 1e12)
    }

    fn seconds(&mut self, begin: impl FnOnce(&mut Self) -> Result<()>) -> Result<f64> {
        let start = Moment::now(&self.device)?;
        begin(self)?;
        Moment::now(&self.device)?.seconds_since(&start)
    }

    /// Begins to read all memory; returns how many threads do it.
    fn begin_reading(&self) -> Result<usize> {
        let most = self.target.bytes() / size_of::<u32>() / THREADS;
        let blocks = (BLOCKS * self.device.multiprocessors() as usize).min(most.max(1));
        let launch = Launch { grid: (blocks as u32, 1), threads: THREADS as u32, shared_bytes: 0 };
        let arguments = Arguments::default()
            .with(self.source.pointer())
            .with((self.bytes / PIECE_BYTES) as i64)
            .with(self.target.pointer());
        // SAFETY: the source is as large as said; the target has a word for every thread. See bandwidth.cu.
        unsafe { self.device.launch("read_memory", launch, arguments) }?;
        Ok(blocks * THREADS)
    }

    fn check_reading(&self, pattern: &[u8]) -> Result<()> {
        let mut words = vec![0; self.begin_reading()? * size_of::<u32>()];
        self.target.read(0, &mut words)?;
        let folded =
            |bytes: &[u8]| bytes.as_chunks().0.iter().fold(0, |sum, &word| sum ^ u32::from_le_bytes(word));
        let whole = if (self.bytes / pattern.len()).is_multiple_of(2) { 0 } else { folded(pattern) };
        if folded(&words) == whole ^ folded(&pattern[..self.bytes % pattern.len()]) {
            return Ok(());
        }
        Err(Error::Device { what: WHAT.into(), why: "memory was not read as it was written".into() })
    }
}

/// Numbers in bf16 between −1 and 1, all as likely, by xorshift (Marsaglia 2003).
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9u32;
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bf16::from_f32(state as i32 as f32 / (1u32 << 31) as f32).to_le_bytes()
    };
    (0..PATTERN_BYTES / 2).flat_map(|_| number()).collect()
}
