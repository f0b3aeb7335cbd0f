//! Which blocks hold which tokens: a tree, in which each block stands under the one in front of it.
//!
//! The keys and values of a block depend on all tokens up to its end, so a block is known by its place: what it stands under, and its
//! own tokens. Those are compared and not hashed, so nothing collides.
//!
//! Whoever holds a block holds all in front of it. So what nobody holds lies at the ends of the branches, and goes from there.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::BlockId;

/// Blocks that are full, and of which every key and value was computed.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    nodes: BTreeMap<BlockId, Node>,
    /// The blocks at position 0.
    roots: Children,
    /// What nobody holds, by the time at which it was let go: children before parents.
    idle: BTreeMap<u64, BlockId>,
    /// Counts how often anything was let go.
    time: u64,
}

type Children = BTreeMap<Arc<[u32]>, BlockId>;

#[derive(Debug)]
struct Node {
    parent: Option<BlockId>,
    tokens: Arc<[u32]>,
    children: Children,
    holders: usize,
    /// When the last holder let go.
    idle_since: u64,
}

impl PrefixTree {
    /// The longest run of blocks from position 0 that hold `contents`, block by block.
    pub(crate) fn longest_run<'a>(&self, contents: impl Iterator<Item = &'a [u32]>) -> Vec<BlockId> {
        let mut last = None;
        let next = |tokens| {
            last = Some(self.child(last, tokens)?);
            last
        };
        contents.map_while(next).collect()
    }

    /// The block with `tokens` under `parent`, or at position 0.
    pub(crate) fn child(&self, parent: Option<BlockId>, tokens: &[u32]) -> Option<BlockId> {
        let children = match parent {
            Some(parent) => &self.nodes.get(&parent)?.children,
            None => &self.roots,
        };
        children.get(tokens).copied()
    }

    /// Takes in a block of which there is no like yet, held once, under a parent with the same holder.
    pub(crate) fn insert(&mut self, parent: Option<BlockId>, tokens: &[u32], block: BlockId) {
        let tokens = Arc::<[u32]>::from(tokens);
        if let Some(children) = self.children_of(parent) {
            children.insert(tokens.clone(), block);
        }
        let node = Node { parent, tokens, children: Children::new(), holders: 1, idle_since: 0 };
        self.nodes.insert(block, node);
    }

    /// Whether anybody holds a block.
    pub(crate) fn is_held(&self, block: BlockId) -> bool {
        self.nodes.get(&block).is_some_and(|node| node.holders > 0)
    }

    /// One more holds a block. All in front of it must be held by the same.
    pub(crate) fn hold(&mut self, block: BlockId) {
        let Some(node) = self.nodes.get_mut(&block) else { return };
        if node.holders == 0 {
            self.idle.remove(&node.idle_since);
        }
        node.holders += 1;
    }

    /// One less holds a block; none that stands under it may be held by the same still.
    pub(crate) fn let_go(&mut self, block: BlockId) {
        let Some(node) = self.nodes.get_mut(&block) else { return };
        node.holders -= 1;
        if node.holders == 0 {
            node.idle_since = self.time;
            self.idle.insert(self.time, block);
            self.time += 1;
        }
    }

    /// Blocks that nobody holds.
    pub(crate) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Forgets the block that has been without a holder for the longest time.
    pub(crate) fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.idle.pop_first()?;
        let node = self.nodes.remove(&block)?;
        debug_assert!(node.children.is_empty(), "a block goes after those under it");
        if let Some(siblings) = self.children_of(node.parent) {
            siblings.remove(&node.tokens);
        }
        Some(block)
    }

    fn children_of(&mut self, parent: Option<BlockId>) -> Option<&mut Children> {
        match parent {
            Some(parent) => self.nodes.get_mut(&parent).map(|node| &mut node.children),
            None => Some(&mut self.roots),
        }
    }

    /// All tokens up to the end of a block.
    #[cfg(test)]
    pub(crate) fn prefix(&self, block: BlockId) -> Vec<u32> {
        let node = &self.nodes[&block];
        [node.parent.map_or(vec![], |parent| self.prefix(parent)).as_slice(), &node.tokens].concat()
    }

    /// Blocks of the tree with their holders, after a look at whether all of it hangs together.
    #[cfg(test)]
    pub(crate) fn holders(&self) -> BTreeMap<BlockId, usize> {
        for (block, node) in &self.nodes {
            assert_eq!(self.child(node.parent, &node.tokens), Some(*block), "not where it should be found");
            assert_eq!(self.idle.get(&node.idle_since) == Some(block), node.holders == 0, "{block} idle?");
            let Some(parent) = node.parent.map(|parent| &self.nodes[&parent]) else { continue };
            assert!(parent.holders >= node.holders, "whoever holds a block holds all in front of it");
            assert!(node.holders > 0 || parent.holders > 0 || parent.idle_since > node.idle_since, "order");
        }
        let children = self.nodes.values().map(|node| node.children.len()).sum::<usize>();
        assert_eq!(self.roots.len() + children, self.nodes.len(), "a child is not there");
        self.nodes.iter().map(|(block, node)| (*block, node.holders)).collect()
    }
}
