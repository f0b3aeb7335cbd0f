//! The calls: what is sent to whom, and in what order it is added.

use std::ops::Range;

use super::Communicator;
use super::library::{FLOAT32, IN_PROGRESS, SUCCESS, SUM};
use crate::cuda::buffer::Buffer;
use crate::cuda::fold::{FoldProgram, Outputs, Parts, fold, place_columns};
use crate::cuda::memory::Memory;
use crate::{Error, Partial, Result, Tree};

/// Up to this many elements of a sum (256 KiB), latency counts more than bytes: everybody gets everything.
const ONE_SHOT_ELEMENTS: usize = 1 << 16;
/// Parts and shares begin on a multiple of this many elements: what `fold` needs.
const ALIGNMENT: usize = 64;

impl Communicator {
    /// Begins to add the sums of all units, in an order that is NCCL's own: `partials` are this rank's sub-trees, of each the first
    /// `len` elements. `out` is f32 of at least `len` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] for too short buffers, [`Error::Device`] where NCCL fails or gave up.
    pub fn all_reduce(
        &mut self,
        len: usize,
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let (parts, out) = self.addresses(len, partials, out)?;
        if len == 0 {
            return Ok(());
        }
        let outputs = Outputs::new(std::iter::once(out));
        let program = FoldProgram::in_order(parts.len());
        // SAFETY: the sizes were checked.
        unsafe { fold(&self.device, Parts::new(parts.into_iter()), program, outputs, len)? };
        self.group("adding by NCCL", go_on, |it| {
            let stream = it.stream.cu_stream().cast();
            // SAFETY: as many elements as were checked, in place.
            unsafe {
                (it.nccl.functions.all_reduce)(out as _, out as _, len, FLOAT32, SUM, it.handle, stream)
            }
        })?;
        self.stay_near(go_on)
    }

    /// Likewise along `tree`: every rank gets the same bits. `subtrees` are those of every rank.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn tree_reduce(
        &mut self,
        tree: Tree,
        len: usize,
        subtrees: &[Vec<Range<usize>>],
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let (own, out) = self.addresses(len, partials, out)?;
        if len == 0 {
            return Ok(());
        }
        let cut = |rank| if rank == self.size { len } else { len * rank / self.size / ALIGNMENT * ALIGNMENT };
        let shares: Vec<Range<usize>> = if len <= ONE_SHOT_ELEMENTS {
            vec![0..len; self.size]
        } else {
            (0..self.size).map(|rank| cut(rank)..cut(rank + 1)).collect()
        };
        let share = shares[self.rank].clone();

        let stride = share.len().next_multiple_of(ALIGNMENT);
        let inbox = self.inbox(subtrees.iter().map(Vec::len).sum::<usize>() * stride)?;
        let mut leaves = Vec::new();
        let mut messages = Vec::new();
        let mut free = inbox;
        for (rank, theirs) in subtrees.iter().enumerate() {
            if rank == self.rank {
                leaves.extend(own.iter().map(|&part| element(part, share.start)));
                continue;
            }
            messages.extend(
                own.iter().map(|&p| Message::to(rank, element(p, shares[rank].start), shares[rank].len())),
            );
            for _ in theirs {
                messages.push(Message::from(rank, free, share.len()));
                leaves.push(free);
                free = element(free, stride);
            }
        }
        self.exchange(&messages, go_on)?;
        let all: Vec<_> = subtrees.iter().flatten().cloned().collect();
        let whole = 0..tree.units;
        let program = FoldProgram::new(&all, std::slice::from_ref(&whole))?;
        let outputs = Outputs::new(std::iter::once(element(out, share.start)));
        // SAFETY: each leaf has the share's elements, aligned as shares are.
        unsafe { fold(&self.device, Parts::new(leaves.into_iter()), program, outputs, share.len())? };

        if share.len() < len {
            let others = (0..self.size).filter(|rank| *rank != self.rank);
            let both = others.flat_map(|rank| {
                let theirs = &shares[rank];
                let to = Message::to(rank, element(out, share.start), share.len());
                [to, Message::from(rank, element(out, theirs.start), theirs.len())]
            });
            self.exchange(&both.collect::<Vec<_>>(), go_on)?;
        }
        self.stay_near(go_on)
    }

    /// Begins to put the ranks' columns side by side on rank `root`: `x` is f32 `[rows, counts[rank]]`, `out` there
    /// `[rows, Σ counts]`, untouched elsewhere.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn gather(
        &mut self,
        root: usize,
        rows: usize,
        x: &Buffer,
        counts: &[usize],
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        const OP: &str = "gather";
        let all = counts.iter().sum::<usize>();
        if i32::try_from(rows.saturating_mul(all)).is_err() {
            return Err(Error::Shape { op: OP, detail: format!("{rows} rows of {all} columns") });
        }
        let x = x.floats(OP, &self.device, rows * counts[self.rank])?;
        if self.rank != root {
            self.exchange(&[Message::to(root, x, rows * counts[self.rank])], go_on)?;
            return self.stay_near(go_on);
        }
        let out = out.floats(OP, &self.device, rows * all)?;
        let mut free = self.inbox(rows * all)?;
        let mut sources = Vec::new();
        let mut messages = Vec::new();
        for (rank, count) in counts.iter().enumerate() {
            if rank == self.rank {
                sources.push(x);
                continue;
            }
            messages.push(Message::from(rank, free, rows * count));
            sources.push(free);
            free = element(free, rows * count);
        }
        self.exchange(&messages, go_on)?;
        let mut first = 0;
        for (source, &count) in sources.into_iter().zip(counts) {
            // SAFETY: the sizes were checked; the inbox holds what was received.
            unsafe { place_columns(&self.device, source, (rows, count), out, (first, all))? };
            first += count;
        }
        self.stay_near(go_on)
    }

    /// Begins to copy the first `len` elements of `x`, f32, from rank `root` to all others.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn broadcast(
        &mut self,
        root: usize,
        len: usize,
        x: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let x = x.floats("broadcast", &self.device, len)?;
        let messages: Vec<Message> = if self.rank == root {
            (0..self.size).filter(|rank| *rank != root).map(|rank| Message::to(rank, x, len)).collect()
        } else {
            vec![Message::from(root, x, len)]
        };
        self.exchange(&messages, go_on)?;
        self.stay_near(go_on)
    }

    /// Waits for what rank `from` sends: the first `len` elements of `out`, f32. All that was begun before has ended then.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn receive(
        &mut self,
        from: usize,
        len: usize,
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let out = out.floats("receive", &self.device, len)?;
        self.exchange(&[Message::from(from, out, len)], go_on)?;
        self.wait(go_on)
    }

    fn addresses(&self, len: usize, partials: &[Partial<Buffer>], out: &Buffer) -> Result<(Vec<u64>, u64)> {
        const OP: &str = "tree_reduce";
        let parts = partials.iter().map(|partial| partial.sum.floats(OP, &self.device, len));
        Ok((parts.collect::<Result<_>>()?, out.floats(OP, &self.device, len)?))
    }

    /// The address of room for `len` elements.
    fn inbox(&mut self, len: usize) -> Result<u64> {
        let bytes = len.next_power_of_two() * size_of::<f32>();
        if let Some(inbox) = self.inboxes.last().filter(|inbox| inbox.bytes() >= bytes) {
            return Ok(inbox.pointer());
        }
        let inbox = Memory::allocate(&self.device, "what other ranks send", bytes)?;
        let pointer = inbox.pointer();
        self.inboxes.push(inbox);
        Ok(pointer)
    }

    /// Begins all of these at once, so that they cannot block each other.
    pub(super) fn exchange(&mut self, messages: &[Message], go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        if messages.iter().all(|message| message.len == 0) {
            return Ok(());
        }
        self.group("exchanging by NCCL", go_on, |it| {
            let stream = it.stream.cu_stream().cast();
            let functions = &it.nccl.functions;
            for &Message { peer, address, len, sent } in messages.iter().filter(|message| message.len > 0) {
                // SAFETY: the addresses hold as many elements until the device has ended this.
                let status = unsafe {
                    match sent {
                        true => (functions.send)(address as _, len, FLOAT32, peer as i32, it.handle, stream),
                        false => {
                            (functions.receive)(address as _, len, FLOAT32, peer as i32, it.handle, stream)
                        }
                    }
                };
                if status != SUCCESS && status != IN_PROGRESS {
                    return status;
                }
            }
            SUCCESS
        })
    }
}

/// One part of an exchange.
pub(super) struct Message {
    peer: usize,
    address: u64,
    /// Elements.
    len: usize,
    sent: bool,
}

impl Message {
    pub(super) fn to(peer: usize, address: u64, len: usize) -> Self {
        Self { peer, address, len, sent: true }
    }

    fn from(peer: usize, address: u64, len: usize) -> Self {
        Self { peer, address, len, sent: false }
    }
}

/// The address of an element of f32.
fn element(address: u64, index: usize) -> u64 {
    address + (index * size_of::<f32>()) as u64
}
