//! Who owns which KV block. Ranks are only told; this is the one place that knows.

use crate::BlockId;

/// The free blocks of a group; every other block is held in one [`BlockTable`].
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// The next to be taken is the last.
    free: Vec<BlockId>,
    total: usize,
}

/// The blocks of one sequence, in order of positions. Only a pool adds to it, and it cannot be copied, so no block is
/// held or given back twice.
#[derive(Debug, Default)]
pub(crate) struct BlockTable(Vec<BlockId>);

impl BlockTable {
    pub(crate) fn blocks(&self) -> &[BlockId] {
        &self.0
    }
}

impl BlockPool {
    /// Blocks `0..blocks`, taken lowest first.
    pub(crate) fn new(blocks: u32) -> Self {
        Self { free: (0..blocks).rev().map(BlockId).collect(), total: blocks as usize }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a table `blocks` blocks long; if there are too few, changes nothing and returns false. A table that is as
    /// long already stays as it is.
    pub(crate) fn grow(&mut self, table: &mut BlockTable, blocks: usize) -> bool {
        let missing = blocks.saturating_sub(table.0.len());
        let Some(rest) = self.free.len().checked_sub(missing) else { return false };
        table.0.extend(self.free.drain(rest..).rev());
        true
    }

    /// Takes back all blocks of a table of this pool.
    pub(crate) fn give_back(&mut self, table: BlockTable) {
        self.free.extend(table.0.into_iter().rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(table: &BlockTable) -> Vec<u32> {
        table.blocks().iter().map(|block| block.0).collect()
    }

    #[test]
    fn grows_wholly_or_not_at_all() {
        let mut pool = BlockPool::new(4);
        let (mut one, mut other) = (BlockTable::default(), BlockTable::default());
        assert!(pool.grow(&mut one, 2) && pool.grow(&mut other, 1));
        assert_eq!((ids(&one), ids(&other)), (vec![0, 1], vec![2]));
        assert!(!pool.grow(&mut other, 3));
        assert_eq!((ids(&other), pool.free(), pool.total()), (vec![2], 1, 4));
        assert!(pool.grow(&mut other, 1) && pool.grow(&mut other, 2));
        assert_eq!((ids(&other), pool.free()), (vec![2, 3], 0));
    }

    #[test]
    fn blocks_come_back_in_the_order_they_were_taken() {
        let mut pool = BlockPool::new(3);
        for _ in 0..2 {
            let mut table = BlockTable::default();
            assert!(pool.grow(&mut table, 3));
            assert_eq!(ids(&table), [0, 1, 2]);
            pool.give_back(table);
        }
    }
}
