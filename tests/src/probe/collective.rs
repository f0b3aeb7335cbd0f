//! What ranks do together, as threads of this process with this machine's GPUs in turn, or all on one.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Result, ensure};
use comm::cuda::{LocalGpu, LocalGpuSeat, local_gpu_group};
use comm::{AbortHandle, Collective};
use engine::rank_ranges;
use kernels::{Backend, Cuda, CudaOptions, DType, Partial, Tree};
use phalanx_tests::ranks::each_rank;
use serde::Deserialize;

use crate::tensors::{Inputs, Matrix, Outputs};

/// How long a rank waits for another; the emulator is slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The sum over all units, along the tree.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reduce {
    /// `[units, len]`, F32: what each unit adds.
    sums: String,
    /// Ranks.
    width: usize,
}

/// Runs of columns side by side on one rank.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gather {
    /// `[rows, all columns]`, F32.
    x: String,
    /// Columns of each rank.
    counts: Vec<usize>,
    root: usize,
}

/// Takes a seat with a GPU of this machine.
pub(crate) fn join(
    seat: LocalGpuSeat,
    ranges: &[Range<usize>],
    options: CudaOptions,
) -> Result<(Cuda, LocalGpu)> {
    let ordinal = seat.rank() % kernels::gpus()?;
    let gpu = Cuda::open(CudaOptions { ordinal, ..options })?;
    let collective = seat.join(&gpu, ranges.to_vec(), AbortHandle::default(), PATIENCE)?;
    Ok((gpu, collective))
}

impl Reduce {
    pub(crate) fn run(&self, name: &str, inputs: &Inputs<'_>, outputs: &mut Outputs) -> Result<()> {
        let sums = inputs.matrix(&self.sums)?;
        let (tree, len) = (Tree { units: sums.rows }, sums.cols);
        let ranges = rank_ranges(sums.rows, self.width)?;
        let reduced = each_rank(local_gpu_group(self.width), |seat| {
            let rank = seat.rank();
            let (gpu, mut collective) = join(seat, &ranges, CudaOptions::default())?;
            let mut partials = Vec::new();
            for units in tree.subtrees(&ranges[rank]) {
                let values = sum_along_tree(&sums, units.clone());
                let sum = Matrix { rows: 1, cols: len, values }.on(&gpu, DType::F32)?;
                partials.push(Partial { units, sum });
            }
            let mut out = gpu.buffer(DType::F32, 1, len)?;
            collective.tree_reduce(tree, len, &partials, &mut out)?;
            gpu.synchronize()?;
            collective.check()?;
            let values = out.read(len)?;
            drop(collective);
            Ok(values)
        })?;
        for (rank, values) in reduced.iter().enumerate() {
            outputs.floats(format!("{name}.{rank}"), len, values);
        }
        Ok(())
    }
}

/// What a rank would have of these units before it meets the others.
fn sum_along_tree(sums: &Matrix, units: Range<usize>) -> Vec<f32> {
    if units.len() == 1 {
        return sums.values[units.start * sums.cols..units.end * sums.cols].to_vec();
    }
    let middle = Tree::split(&units);
    let right = sum_along_tree(sums, middle..units.end);
    let left = sum_along_tree(sums, units.start..middle);
    left.iter().zip(right).map(|(left, right)| left + right).collect()
}

impl Gather {
    pub(crate) fn run(&self, name: &str, inputs: &Inputs<'_>, outputs: &mut Outputs) -> Result<()> {
        let x = inputs.matrix(&self.x)?;
        let (width, cols) = (self.counts.len(), self.counts.iter().sum::<usize>());
        ensure!(
            cols == x.cols && self.root < width,
            "{:?} columns of {}, root {}",
            self.counts,
            x.cols,
            self.root
        );
        let ranges = rank_ranges(width, width)?;
        let gathered = each_rank(local_gpu_group(width), |seat| {
            let rank = seat.rank();
            let (gpu, mut collective) = join(seat, &ranges, CudaOptions::default())?;
            let first: usize = self.counts[..rank].iter().sum();
            let columns = first..first + self.counts[rank];
            let values = x.values.chunks(cols).flat_map(|row| row[columns.clone()].to_vec()).collect();
            let own = Matrix { rows: x.rows, cols: columns.len(), values }.on(&gpu, DType::F32)?;
            let mut out = gpu.buffer(DType::F32, x.rows, cols)?;
            collective.gather(self.root, x.rows, &own, &self.counts, &mut out)?;
            gpu.synchronize()?;
            collective.check()?;
            let values = out.read(x.rows * cols)?;
            drop(collective);
            Ok(values)
        })?;
        outputs.floats(name, cols, &gathered[self.root]);
        Ok(())
    }
}
