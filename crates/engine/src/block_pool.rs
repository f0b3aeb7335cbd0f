//! Who owns which KV block. Ranks are only told; this is the one place that knows.
//!
//! A block is *free*; or *held*, by one sequence or by several that share a prefix; or *cached*: nobody holds it, and what it holds is
//! good for the next sequence that begins with the same tokens, until the block is needed.

use crate::BlockId;
use crate::prefix_tree::PrefixTree;

/// The blocks of a group that nobody holds, and those that may be shared.
#[derive(Debug)]
pub(crate) struct BlockPool {
    block_size: usize,
    /// Those that hold nothing of use. The next to be taken is the last.
    free: Vec<BlockId>,
    /// Those that are cached, and those that are held and may be shared.
    prefixes: PrefixTree,
    total: usize,
}

/// The blocks of one sequence, in order of positions. Only a pool changes it, and it cannot be copied, so no block is
/// given back twice.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    blocks: Vec<BlockId>,
    /// How many of them, from the first on, others may hold too. They are full: nothing is written there any more.
    shared: usize,
}

impl BlockTable {
    pub(crate) fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}

impl BlockPool {
    /// Blocks `0..blocks` of `block_size` tokens, taken lowest first.
    pub(crate) fn new(blocks: u32, block_size: usize) -> Self {
        let free = (0..blocks).rev().map(BlockId).collect();
        Self { block_size, free, prefixes: PrefixTree::default(), total: blocks as usize }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn cached(&self) -> usize {
        self.prefixes.idle()
    }

    /// Blocks that nobody holds.
    pub(crate) fn available(&self) -> usize {
        self.free() + self.cached()
    }

    /// How many of `tokens` a sequence would find computed, if it began with them now.
    pub(crate) fn cached_prefix(&self, tokens: &[u32]) -> usize {
        self.longest_run(tokens).len() * self.block_size
    }

    /// How many of the blocks that nobody holds a sequence of `tokens` would take, if it began with them now.
    pub(crate) fn needed(&self, tokens: &[u32]) -> usize {
        let held = |block: &&BlockId| self.prefixes.is_held(**block);
        tokens.len().div_ceil(self.block_size) - self.longest_run(tokens).iter().filter(held).count()
    }

    /// The table of a sequence that begins with `tokens`, and how many of them are computed in it.
    pub(crate) fn begin(&mut self, tokens: &[u32]) -> (BlockTable, usize) {
        let blocks = self.longest_run(tokens);
        blocks.iter().for_each(|block| self.prefixes.hold(*block));
        let shared = blocks.len();
        (BlockTable { blocks, shared }, shared * self.block_size)
    }

    /// Makes a table `blocks` blocks long; if there are too few, changes nothing and returns false. A table that is as
    /// long already stays as it is.
    pub(crate) fn grow(&mut self, table: &mut BlockTable, blocks: usize) -> bool {
        let missing = blocks.saturating_sub(table.blocks.len());
        if missing > self.available() {
            return false;
        }
        let next = || self.free.pop().or_else(|| self.prefixes.evict());
        table.blocks.extend(std::iter::from_fn(next).take(missing));
        true
    }

    /// Lets others share the full blocks of a table that starts with `tokens`: known ones, all written by steps that were applied.
    ///
    /// If another sequence was first with the same, a table takes its blocks and frees its own; but not if a step in flight has
    /// it, which may read them.
    pub(crate) fn share(&mut self, table: &mut BlockTable, tokens: &[u32], in_flight: bool) {
        for content in tokens.chunks_exact(self.block_size).skip(table.shared) {
            let parent = table.blocks[..table.shared].last().copied();
            let own = &mut table.blocks[table.shared];
            match self.prefixes.child(parent, content) {
                None => self.prefixes.insert(parent, content, *own),
                Some(_) if in_flight => return,
                Some(block) => {
                    self.prefixes.hold(block);
                    self.free.push(std::mem::replace(own, block));
                }
            }
            table.shared += 1;
        }
    }

    /// Takes back all blocks of a table of this pool that starts with `tokens`, as in [`Self::share`], and keeps the full ones cached. No
    /// step in flight may have it.
    pub(crate) fn give_back(&mut self, mut table: BlockTable, tokens: &[u32]) {
        self.share(&mut table, tokens, false);
        self.free.extend(table.blocks.drain(table.shared..).rev());
        // The last goes first, and is the first to be forgotten: it is of use only together with all in front of it.
        table.blocks.into_iter().rev().for_each(|block| self.prefixes.let_go(block));
    }

    /// The last token is left out: somebody has to compute the logits of what follows.
    fn longest_run(&self, tokens: &[u32]) -> Vec<BlockId> {
        let known = tokens.split_last().map_or(tokens, |(_, known)| known);
        self.prefixes.longest_run(known.chunks_exact(self.block_size))
    }

    /// All tokens up to the end of a shared block.
    #[cfg(test)]
    pub(crate) fn prefix(&self, block: BlockId) -> Vec<u32> {
        self.prefixes.prefix(block)
    }

    /// The shared blocks with their holders, after a look at whether all is well with them.
    #[cfg(test)]
    pub(crate) fn holders(&self) -> std::collections::BTreeMap<BlockId, usize> {
        let holders = self.prefixes.holders();
        assert!(self.free.iter().all(|block| !holders.contains_key(block)), "free and shared");
        holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(table: &BlockTable) -> Vec<u32> {
        table.blocks().iter().map(|block| block.0).collect()
    }

    /// Blocks of two tokens.
    fn pool(blocks: u32) -> BlockPool {
        BlockPool::new(blocks, 2)
    }

    /// A sequence that began with `tokens`, of which all are computed.
    fn computed(pool: &mut BlockPool, tokens: &[u32]) -> BlockTable {
        let (mut table, _) = pool.begin(tokens);
        assert!(pool.grow(&mut table, tokens.len().div_ceil(2)));
        pool.share(&mut table, tokens, true);
        table
    }

    fn leave_cached(pool: &mut BlockPool, tokens: &[u32]) {
        let table = computed(pool, tokens);
        pool.give_back(table, tokens);
    }

    #[test]
    fn grows_wholly_or_not_at_all() {
        let mut pool = pool(4);
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
        let mut pool = pool(3);
        for _ in 0..2 {
            let mut table = BlockTable::default();
            assert!(pool.grow(&mut table, 3));
            assert_eq!(ids(&table), [0, 1, 2]);
            pool.give_back(table, &[]);
        }
    }

    #[test]
    fn full_blocks_are_shared_but_never_all_tokens() {
        let mut pool = pool(9);
        let one = computed(&mut pool, &[1, 2, 3, 4, 5]);
        for (tokens, prefix) in [
            (&[1, 2, 3, 4, 5][..], 4),
            (&[1, 2, 3, 4], 2),
            (&[1, 2, 3, 4, 9], 4),
            (&[1, 2, 9, 4, 5], 2),
            (&[3, 4, 5], 0),
            (&[1], 0),
            (&[], 0),
        ] {
            assert_eq!(pool.cached_prefix(tokens), prefix, "{tokens:?}");
            assert_eq!(pool.needed(tokens), tokens.len().div_ceil(2) - prefix / 2);
        }
        let two = computed(&mut pool, &[1, 2, 3, 4, 9]);
        assert_eq!((ids(&one), ids(&two)), (vec![0, 1, 2], vec![0, 1, 3]));
        pool.give_back(one, &[1, 2, 3, 4, 5]);
        assert_eq!((pool.free(), pool.cached()), (6, 0), "the other holds them still");
        pool.give_back(two, &[1, 2, 3, 4, 9]);
        assert_eq!((pool.free(), pool.cached()), (7, 2));
        assert_eq!(pool.needed(&[1, 2, 3, 4, 9]), 3, "nobody holds them");
    }

    /// The same tokens in another place have other keys and values.
    #[test]
    fn a_block_is_known_by_all_in_front_of_it() {
        let mut pool = pool(9);
        leave_cached(&mut pool, &[1, 2, 5, 5, 0]);
        leave_cached(&mut pool, &[3, 4, 5, 5, 0]);
        assert_eq!(pool.cached(), 4);
        assert_eq!(ids(&pool.begin(&[1, 2, 5, 5, 0]).0), [0, 1]);
        assert_eq!(pool.cached_prefix(&[5, 5, 0]), 0);
        assert_eq!(pool.cached_prefix(&[1, 2, 1, 2, 0]), 2);
    }

    #[test]
    fn the_longest_unused_goes_first_and_its_end_before_its_start() {
        let mut pool = pool(6);
        leave_cached(&mut pool, &[1, 1, 2, 2]);
        leave_cached(&mut pool, &[3, 3, 4, 4]);
        leave_cached(&mut pool, &[1, 1, 5, 5]);
        assert_eq!((pool.free(), pool.cached()), (1, 5));
        let prefixes = |pool: &BlockPool| {
            [[1, 1, 2, 2, 0], [3, 3, 4, 4, 0], [1, 1, 5, 5, 0]].map(|tokens| pool.cached_prefix(&tokens))
        };
        let mut table = BlockTable::default();
        let mut after = |blocks| {
            assert!(pool.grow(&mut table, blocks));
            prefixes(&pool)
        };
        assert_eq!(after(1), [4, 4, 4], "a free block is there");
        assert_eq!(after(2), [2, 4, 4]);
        assert_eq!(after(3), [2, 2, 4]);
        assert_eq!(after(4), [2, 0, 4]);
        assert_eq!(after(5), [2, 0, 2]);
        assert_eq!(after(6), [0, 0, 0]);
        assert!(!pool.grow(&mut table, 7));
    }

    #[test]
    fn whoever_computed_the_same_beside_another_gives_its_copy_up_when_no_step_reads_it() {
        let mut pool = pool(9);
        let tokens = [1, 2, 3, 4, 5, 6];
        let [mut one, mut two] = [BlockTable::default(), BlockTable::default()];
        assert!(pool.grow(&mut one, 2) && pool.grow(&mut two, 3));
        pool.share(&mut one, &tokens[..4], true);
        pool.share(&mut two, &tokens, true);
        assert_eq!((ids(&two), pool.cached_prefix(&[1, 2, 3, 4, 5, 6, 7])), (vec![2, 3, 4], 4));
        pool.share(&mut two, &tokens, false);
        assert_eq!((ids(&two), pool.cached_prefix(&[1, 2, 3, 4, 5, 6, 7])), (vec![0, 1, 4], 6));
        pool.give_back(one, &tokens[..4]);
        pool.give_back(two, &tokens);
        assert_eq!((pool.free(), pool.cached()), (6, 3));
    }

    /// What was written behind the known tokens is nobody's.
    #[test]
    fn blocks_with_unknown_tokens_are_not_cached() {
        let mut pool = pool(3);
        let mut table = BlockTable::default();
        assert!(pool.grow(&mut table, 3));
        pool.give_back(table, &[1, 2, 3]);
        assert_eq!((pool.free(), pool.cached()), (2, 1));
    }
}
