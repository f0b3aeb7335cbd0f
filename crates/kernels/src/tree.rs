//! The reduction tree: one fixed binary tree over all units of a model.
//!
//! A node covers a run of units and splits at the middle (the left part takes the extra unit). Partial sums are
//! added along this tree whoever holds them, so the result is the same bits for every distribution of units.

use std::ops::Range;

/// The tree over `units` units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tree {
    /// Leaves.
    pub units: usize,
}

impl Tree {
    /// The largest sub-trees that lie wholly in `held`, in order: what a rank can add by itself.
    pub fn subtrees(&self, held: &Range<usize>) -> Vec<Range<usize>> {
        let mut out = Vec::new();
        collect(0..self.units, held, &mut out);
        out
    }

    /// Where a node of more than one unit splits.
    pub fn split(node: &Range<usize>) -> usize {
        node.start + node.len().div_ceil(2)
    }
}

fn collect(node: Range<usize>, held: &Range<usize>, out: &mut Vec<Range<usize>>) {
    let apart = node.start >= held.end || node.end <= held.start;
    if apart {
        return;
    }
    if held.start <= node.start && node.end <= held.end {
        out.push(node);
        return;
    }
    let middle = Tree::split(&node);
    collect(node.start..middle, held, out);
    collect(middle..node.end, held, out);
}
