//! The reduction tree as kernels take it: a program for a stack machine (see `tree.cuh`).

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::device::{Arguments, Device, Launch};
use crate::{Error, Result, Tree};

/// The largest number of units, and of parts of a sum.
pub(crate) const MAX_UNITS: usize = 64;
/// Sub-trees that a rank can hold: those of a run of leaves of a tree of [`MAX_UNITS`].
pub(crate) const MAX_OUTPUTS: usize = 16;
/// Elements that a block of `fold` adds.
const BLOCK_ELEMENTS: usize = 1024;

/// For each leaf in order: push it, add the two on top `merges` times, then pop into output `store` unless that is −1.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct FoldProgram {
    count: i32,
    merges: [u8; MAX_UNITS],
    store: [i8; MAX_UNITS],
}

/// Where the sums of the roots go.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Outputs([u64; MAX_OUTPUTS]);

/// What is added.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Parts([u64; MAX_UNITS]);

impl FoldProgram {
    /// Adds `leaves`, nodes of the tree in order, into `roots`, nodes that they tile.
    pub(crate) fn new(leaves: &[Range<usize>], roots: &[Range<usize>]) -> Result<Self> {
        let too_many = |what: &str, count, limit| {
            Err(Error::Unsupported(format!("{count} {what} of the reduction tree: the GPU takes {limit}")))
        };
        if leaves.len() > MAX_UNITS {
            return too_many("parts", leaves.len(), MAX_UNITS);
        }
        if roots.len() > MAX_OUTPUTS {
            return too_many("sub-trees", roots.len(), MAX_OUTPUTS);
        }
        let mut program = Self { count: leaves.len() as i32, merges: [0; MAX_UNITS], store: [-1; MAX_UNITS] };
        let mut pushed = 0;
        for (index, root) in roots.iter().enumerate() {
            program.add(root, leaves, &mut pushed)?;
            program.store[pushed - 1] = index as i8;
        }
        if pushed == leaves.len() { Ok(program) } else { Err(loose(leaves)) }
    }

    /// Adds `count` leaves, at most [`MAX_UNITS`], one after the other.
    pub(crate) fn in_order(count: usize) -> Self {
        let mut program = Self { count: count as i32, merges: [0; MAX_UNITS], store: [-1; MAX_UNITS] };
        program.merges[..count].iter_mut().skip(1).for_each(|merges| *merges = 1);
        if let Some(last) = program.store[..count].last_mut() {
            *last = 0;
        }
        program
    }

    fn add(&mut self, node: &Range<usize>, leaves: &[Range<usize>], pushed: &mut usize) -> Result<()> {
        if leaves.get(*pushed) == Some(node) {
            *pushed += 1;
            return Ok(());
        }
        if node.len() < 2 {
            return Err(loose(leaves));
        }
        let middle = Tree::split(node);
        self.add(&(node.start..middle), leaves, pushed)?;
        self.add(&(middle..node.end), leaves, pushed)?;
        self.merges[*pushed - 1] += 1;
        Ok(())
    }
}

fn loose(leaves: &[Range<usize>]) -> Error {
    Error::Shape { op: "fold", detail: format!("{leaves:?} do not tile the tree") }
}

impl Outputs {
    /// At most [`MAX_OUTPUTS`].
    pub(crate) fn new(pointers: impl Iterator<Item = u64>) -> Self {
        let mut outputs = Self([0; MAX_OUTPUTS]);
        outputs.0.iter_mut().zip(pointers).for_each(|(to, pointer)| *to = pointer);
        outputs
    }
}

impl Parts {
    /// At most [`MAX_UNITS`].
    pub(crate) fn new(pointers: impl Iterator<Item = u64>) -> Self {
        let mut parts = Self([0; MAX_UNITS]);
        parts.0.iter_mut().zip(pointers).for_each(|(to, pointer)| *to = pointer);
        parts
    }
}

/// Adds `parts` of `count` elements each.
///
/// # Safety
/// As many parts and outputs as the program names, each of `count` elements of f32, aligned to 16 bytes.
pub(crate) unsafe fn fold(
    device: &Device,
    parts: Parts,
    program: FoldProgram,
    outputs: Outputs,
    count: usize,
) -> Result<()> {
    let launch = Launch { grid: (count.div_ceil(BLOCK_ELEMENTS) as u32, 1), threads: 256, shared_bytes: 0 };
    let arguments = Arguments::default().with(parts).with(program).with(outputs).with(count as i64);
    // SAFETY: the caller's promise.
    unsafe { device.launch("fold", launch, arguments) }
}

/// Puts `x`, f32 `[rows, count]`, into the columns from `first` on of `out`, f32 `[rows, all]`; rows · all < 2³¹.
///
/// # Safety
/// The buffers are that large.
pub(crate) unsafe fn place_columns(
    device: &Device,
    x: u64,
    (rows, count): (usize, usize),
    out: u64,
    (first, all): (usize, usize),
) -> Result<()> {
    let launch = Launch { grid: ((rows * count).div_ceil(256) as u32, 1), threads: 256, shared_bytes: 0 };
    let arguments = Arguments::default().with(x).with(rows as i32).with(count as i32);
    let arguments = arguments.with(out).with(first as i32).with(all as i32);
    // SAFETY: the caller's promise.
    unsafe { device.launch_early("place_columns", launch, arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel does with a program, on names instead of numbers.
    fn run(program: &FoldProgram, leaves: &[Range<usize>]) -> Vec<(i8, Range<usize>)> {
        let mut stack: Vec<Range<usize>> = Vec::new();
        let mut stored = Vec::new();
        for (index, leaf) in leaves.iter().enumerate() {
            stack.push(leaf.clone());
            for _ in 0..program.merges[index] {
                let right = stack.pop().expect("right");
                let left = stack.pop().expect("left");
                assert_eq!(left.end, right.start);
                assert_eq!(Tree::split(&(left.start..right.end)), left.end, "the tree splits elsewhere");
                stack.push(left.start..right.end);
            }
            assert!(stack.len() <= 7, "deeper than the kernel's stack");
            if program.store[index] >= 0 {
                stored.push((program.store[index], stack.pop().expect("a sum")));
            }
        }
        assert!(stack.is_empty());
        stored
    }

    proptest! {
        #[test]
        fn units_become_the_subtrees_of_a_rank(units in 1usize..=64, a in 0usize..64, b in 1usize..=64) {
            let held = a.min(units - 1)..b.clamp(a.min(units - 1) + 1, units.max(a.min(units - 1) + 1));
            let leaves: Vec<_> = held.clone().map(|unit| unit..unit + 1).collect();
            let roots = Tree { units }.subtrees(&held);
            let program = FoldProgram::new(&leaves, &roots).unwrap();
            let stored = run(&program, &leaves);
            prop_assert_eq!(stored, (0..).zip(roots).collect::<Vec<_>>());
        }

        #[test]
        fn parts_of_ranks_become_the_whole(units in 1usize..=64, width in 1usize..=16) {
            let width = width.min(units);
            let ranges = (0..width).map(|rank| units * rank / width..units * (rank + 1) / width);
            let leaves: Vec<_> = ranges.flat_map(|held| Tree { units }.subtrees(&held)).collect();
            let whole = 0..units;
            let program = FoldProgram::new(&leaves, std::slice::from_ref(&whole)).unwrap();
            prop_assert_eq!(run(&program, &leaves), vec![(0, whole)]);
        }
    }

    #[test]
    fn parts_that_do_not_tile_the_tree_are_refused() {
        let (four, two) = (0..4, 0..2);
        assert!(FoldProgram::new(&[0..2, 3..4], std::slice::from_ref(&four)).is_err());
        assert!(FoldProgram::new(&[0..1, 1..2, 2..3], std::slice::from_ref(&two)).is_err());
    }
}
