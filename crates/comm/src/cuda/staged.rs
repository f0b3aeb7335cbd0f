//! Sums and columns through the memory of the host: slow, but it needs nothing except a [`Transport`].

use std::ops::Range;

use kernels::cuda::{Buffer, Stage, copy_alone, reduce_alone};
use kernels::{Cuda, Partial, Tree};

use crate::collective::{AbortHandle, Collective, Result};
use crate::fold::Part;
use crate::mesh::MeshCollective;
use crate::transport::Transport;

/// [`MeshCollective`] for buffers on a GPU: copied to the host, exchanged and added there, copied back, with the same bits. A rank
/// that is alone stays on its GPU.
#[derive(Debug)]
pub struct StagedCollective<T> {
    mesh: MeshCollective<T>,
    /// What this rank brings, and what it gets.
    own: Stage,
    result: Stage,
}

impl<T: Transport> StagedCollective<T> {
    /// `ranges`: the units of every rank, in order.
    ///
    /// # Errors
    /// As [`MeshCollective::new`].
    pub fn new(cuda: &Cuda, transport: T, ranges: Vec<Range<usize>>) -> Result<Self> {
        let mesh = MeshCollective::new(transport, ranges)?;
        Ok(Self { mesh, own: Stage::new(cuda), result: Stage::new(cuda) })
    }
}

impl<T: Transport> Collective<Buffer> for StagedCollective<T> {
    fn rank(&self) -> usize {
        self.mesh.transport().rank()
    }

    fn size(&self) -> usize {
        self.mesh.transport().size()
    }

    fn tree_reduce(
        &mut self,
        tree: Tree,
        len: usize,
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
    ) -> Result<()> {
        let Self { mesh, own, result } = self;
        mesh.call(|mesh| {
            let size = mesh.transport().size();
            let units = partials.iter().map(|partial| &partial.units);
            mesh.ranges().check_reduce(tree, mesh.transport().rank(), units)?;
            if size == 1 {
                return Ok(reduce_alone(tree, len, partials, out)?);
            }
            let sums = own.load(partials.iter().map(|partial| &partial.sum), len)?;
            let part = |(index, partial): (usize, &Partial<Buffer>)| {
                (partial.units.clone(), &sums[index * len..(index + 1) * len])
            };
            let own: Vec<Part<'_>> = partials.iter().enumerate().map(part).collect();
            mesh.reduce(tree, &own, result.floats(len)?)?;
            Ok(result.store(len, out)?)
        })
    }

    fn gather(
        &mut self,
        root: usize,
        rows: usize,
        x: &Buffer,
        counts: &[usize],
        out: &mut Buffer,
    ) -> Result<()> {
        let Self { mesh, own, result } = self;
        mesh.call(|mesh| {
            mesh.ranges().check_gather(root, counts)?;
            let rank = mesh.transport().rank();
            if counts.len() == 1 {
                return Ok(copy_alone(rows, counts[rank], x, out)?);
            }
            let own = own.load(std::iter::once(x), rows * counts[rank])?;
            let len = if rank == root { rows * counts.iter().sum::<usize>() } else { 0 };
            mesh.collect(root, rows, own, counts, result.floats(len)?)?;
            Ok(result.store(len, out)?)
        })
    }

    fn broadcast(&mut self, root: usize, len: usize, x: &mut Buffer) -> Result<()> {
        let Self { mesh, own, .. } = self;
        mesh.call(|mesh| {
            mesh.ranges().check_broadcast(root)?;
            if mesh.transport().size() == 1 {
                return Ok(());
            }
            let sends = mesh.transport().rank() == root;
            if sends {
                own.load(std::iter::once(&*x), len)?;
            }
            mesh.hand_out(root, own.floats(len)?)?;
            if sends { Ok(()) } else { Ok(own.store(len, x)?) }
        })
    }

    /// Only where there is nobody to wait for.
    fn can_be_recorded(&self) -> bool {
        self.mesh.transport().size() == 1
    }

    fn abort_handle(&self) -> AbortHandle {
        self.mesh.transport().abort_handle()
    }
}
