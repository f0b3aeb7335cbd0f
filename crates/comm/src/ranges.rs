//! Which units the ranks of a group hold, and what follows for the arguments of a call.

use std::ops::Range;

use kernels::Tree;

use crate::collective::{Error, Result};

/// The units of every rank, in order; they tile all units.
#[derive(Debug, Clone)]
pub(crate) struct Ranges {
    ranges: Vec<Range<usize>>,
    units: usize,
}

impl Ranges {
    /// Fails unless there is one for each of `size` ranks and they are in a row.
    pub(crate) fn new(ranges: Vec<Range<usize>>, size: usize) -> Result<Self> {
        const OP: &str = "forming the group";
        let mut units = 0;
        for range in &ranges {
            if range.start != units || range.end < range.start {
                return Err(shape(OP, format!("units {ranges:?} are not in a row")));
            }
            units = range.end;
        }
        if ranges.len() != size || units == 0 {
            return Err(shape(OP, format!("units {ranges:?} for {size} ranks")));
        }
        Ok(Self { ranges, units })
    }

    /// Ranks.
    #[cfg(feature = "cuda")]
    pub(crate) fn size(&self) -> usize {
        self.ranges.len()
    }

    /// The sub-trees that every rank holds whole.
    pub(crate) fn subtrees(&self, tree: Tree) -> Vec<Vec<Range<usize>>> {
        self.ranges.iter().map(|units| tree.subtrees(units)).collect()
    }

    /// Whether these are the sub-trees of `rank`, of a tree over all units.
    pub(crate) fn check_reduce<'a>(
        &self,
        tree: Tree,
        rank: usize,
        own: impl Iterator<Item = &'a Range<usize>>,
    ) -> Result<()> {
        let (own, expected): (Vec<_>, _) = (own.cloned().collect(), tree.subtrees(&self.ranges[rank]));
        if tree.units == self.units && own == expected {
            return Ok(());
        }
        let detail = format!("sums of {own:?} of {} units where {expected:?} belong", tree.units);
        Err(shape("tree_reduce", detail))
    }

    /// Whether there is a count for every rank, and a root.
    pub(crate) fn check_gather(&self, root: usize, counts: &[usize]) -> Result<()> {
        let size = self.ranges.len();
        if counts.len() == size && root < size {
            return Ok(());
        }
        Err(shape("gather", format!("{} counts and root {root} for {size} ranks", counts.len())))
    }

    /// Whether there is a rank `root`.
    pub(crate) fn check_broadcast(&self, root: usize) -> Result<()> {
        let size = self.ranges.len();
        if root < size { Ok(()) } else { Err(shape("broadcast", format!("root {root} for {size} ranks"))) }
    }
}

fn shape(op: &'static str, detail: String) -> Error {
    Error::Shape { op, detail }
}
