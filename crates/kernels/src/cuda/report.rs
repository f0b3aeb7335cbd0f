//! Where a GPU's memory went.

use std::fmt;

use super::device::Device;
use super::memory::{ACTIVATIONS, KV_CACHE, WEIGHTS};
use crate::{BLOCK_TOKENS, Result};

/// Bytes of a GPU's memory, by what they are for. Shown in one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryReport {
    /// Matrices and embeddings.
    pub weights: u64,
    /// Keys and values.
    pub kv_cache: u64,
    /// Tokens of context that have room there, all sequences together.
    pub kv_tokens: u64,
    /// Buffers of the forward pass, norm weights among them.
    pub activations: u64,
    /// What ops need between their kernels, and what goes to and fro.
    pub work_space: u64,
    /// The driver, kernels, graphs, memory that ranks share, and other programs.
    pub others: u64,
    /// Of nobody.
    pub free: u64,
    /// All.
    pub total: u64,
}

impl MemoryReport {
    pub(crate) fn new(device: &Device, kv_blocks: usize) -> Result<Self> {
        let (free, total) = device.memory()?;
        let allocated = device.allocated();
        let of = |what: &str| allocated.get(what).copied().unwrap_or_default();
        let all: u64 = allocated.values().sum();
        let (weights, kv_cache, activations) = (of(WEIGHTS), of(KV_CACHE), of(ACTIVATIONS));
        Ok(Self {
            weights,
            kv_cache,
            kv_tokens: if kv_cache == 0 { 0 } else { (kv_blocks * BLOCK_TOKENS) as u64 },
            activations,
            work_space: all - weights - kv_cache - activations,
            others: total.saturating_sub(free).saturating_sub(all),
            free,
            total,
        })
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { weights, kv_cache, kv_tokens, activations, work_space, others, free, total } = *self;
        write!(f, "weights {}, KV cache {} for {kv_tokens} tokens, ", Bytes(weights), Bytes(kv_cache))?;
        write!(f, "activations {}, work space {}, ", Bytes(activations), Bytes(work_space))?;
        write!(f, "driver and others {}, free {} of {}", Bytes(others), Bytes(free), Bytes(total))
    }
}

/// A number of bytes as people read it.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / f64::from(1 << 20);
        if mib < 1024.0 { write!(f, "{mib:.1} MiB") } else { write!(f, "{:.2} GiB", mib / 1024.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_tells_all() {
        let report = MemoryReport {
            weights: 64 << 30,
            kv_cache: 3 << 29,
            kv_tokens: 6400,
            activations: 300 << 20,
            work_space: 0,
            others: 1 << 19,
            free: 10 << 30,
            total: 80 << 30,
        };
        assert_eq!(
            report.to_string(),
            "weights 64.00 GiB, KV cache 1.50 GiB for 6400 tokens, activations 300.0 MiB, work space 0.0 MiB, driver and others \
             0.5 MiB, free 10.00 GiB of 80.00 GiB"
        );
    }
}
