//! What decoding is measured against: how fast this process reads memory right now.

use std::time::Instant;

use super::Cpu;
use super::isa::{Isa, Kernel};
use super::memory::Memory;
use crate::Result;

/// Read bandwidth in GB/s: all threads of `cpu` sum up `bytes` bytes in huge pages, each a part of its own. One pass
/// to warm up, then the median of five.
///
/// # Errors
/// [`crate::Error::OutOfMemory`] if the system refuses `bytes` bytes.
pub fn read_bandwidth(cpu: &mut Cpu, bytes: usize) -> Result<f64> {
    let threads = cpu.threads();
    let part = (bytes / 4 / threads).next_multiple_of(STEP);
    let mut memory = Memory::zeroed(part * threads * 4, "a measurement of bandwidth")?;
    memory.as_mut_slice::<f32>().fill(1.0);
    let elements = memory.as_slice::<f32>();
    let mut seconds: Vec<f64> = (0..6)
        .map(|_| {
            let start = Instant::now();
            cpu.pool.for_each(threads, |_, task| {
                let total = cpu.vectors.run(Read(&elements[task * part..][..part]));
                assert!(total > 0.0, "memory of ones adds up");
            });
            start.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    seconds.sort_by(f64::total_cmp);
    Ok((part * threads * 4) as f64 / seconds[seconds.len() / 2] / 1e9)
}

/// Elements that a step reads, on the widest path.
const STEP: usize = 8 * 16;

struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Isa>(self) -> f32 {
        let mut sums = [I::splat(0.0); 8];
        for run in self.0.chunks_exact(8 * I::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: inside the run.
                *sum = I::add(*sum, unsafe { I::load(run.as_ptr().add(i * I::LANES)) });
            }
        }
        sums.into_iter().map(|s| super::vector::sum::<I>(s)).sum()
    }
}
