//! Adding partial sums along the reduction tree.

use std::ops::Range;

use kernels::Tree;

/// Elements that are added at a time, so that the sums of inner nodes stay in the first-level cache.
const BLOCK: usize = 1024;

/// A sub-tree with its sum.
pub(crate) type Part<'a> = (Range<usize>, &'a [f32]);

/// Adds `parts`, which tile the tree and have the length of `out`, node by node along `tree`.
pub(crate) fn fold(tree: Tree, parts: &[Part<'_>], out: &mut [f32]) {
    for (index, block) in out.chunks_mut(BLOCK).enumerate() {
        add_up(&(0..tree.units), parts, index * BLOCK, block);
    }
}

/// `out` = the sum of `node`, elements `first..first + out.len()`.
fn add_up(node: &Range<usize>, parts: &[Part<'_>], first: usize, out: &mut [f32]) {
    if let Some((_, part)) = parts.iter().find(|(units, _)| units == node) {
        out.copy_from_slice(&part[first..first + out.len()]);
        return;
    }
    let middle = Tree::split(node);
    add_up(&(node.start..middle), parts, first, out);
    let mut right = [0.0; BLOCK];
    let right = &mut right[..out.len()];
    add_up(&(middle..node.end), parts, first, right);
    for (sum, term) in out.iter_mut().zip(right) {
        *sum += *term;
    }
}
