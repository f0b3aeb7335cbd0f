//! Newtypes for every identifier, so that none is mistaken for another.

use std::fmt;

/// Which life of a group a plan or an output belongs to. Ordered: a higher `term` fences a lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch {
    /// Election term of the leading coordinator; without an election, its incarnation id.
    pub term: u64,
    /// Counts the formations of one group within a term.
    pub counter: u64,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.counter)
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A step of one group, counted from 0 within an epoch.
    StepId(u64)
);
id!(
    /// A sequence: one request's tokens. Never reused.
    SeqId(u64)
);
id!(
    /// A bounded seat in the running batch: all that a rank may remember is kept per slot.
    SlotId(u32)
);
id!(
    /// A block of KV cache, the same number on every rank.
    BlockId(u32)
);
