//! What goes to the device before a step and comes back after it, through page-locked memory, so that neither waits for the
//! other: the words of a step, and the chosen tokens.

use std::collections::VecDeque;
use std::rc::Rc;

use cudarc::driver::CudaEvent;

use super::device::Device;
use super::memory::{Memory, Pinned};
use crate::{CHOSEN_COLS, Choice, Error, MAX_STEPS_IN_FLIGHT, Result};

/// Words of a step that there is room for at first.
const FIRST_WORDS: usize = 1 << 18;
/// Rows that can be sampled in one step.
pub(crate) const MAX_SAMPLED: usize = 4096;
/// Bytes of a choice: id and log-probability.
const CHOICE_BYTES: usize = CHOSEN_COLS * size_of::<f32>();

/// The words of steps, on their way to one place on the device.
#[derive(Debug)]
pub(crate) struct Words {
    device: Rc<Device>,
    target: Memory,
    stages: Vec<(Pinned, Option<CudaEvent>)>,
    next: usize,
}

impl Words {
    pub(crate) fn new(device: &Rc<Device>) -> Result<Self> {
        Self::with_room(device, FIRST_WORDS)
    }

    fn with_room(device: &Rc<Device>, words: usize) -> Result<Self> {
        let bytes = 4 * words;
        let stages = (0..MAX_STEPS_IN_FLIGHT)
            .map(|_| Ok((Pinned::allocate(device, bytes)?, None)))
            .collect::<Result<_>>()?;
        let target = Memory::allocate(device, "the words of a step", bytes)?;
        Ok(Self { device: device.clone(), target, stages, next: 0 })
    }

    /// Where the words of the latest step are.
    pub(crate) fn pointer(&self) -> u64 {
        self.target.pointer()
    }

    /// Begins to send; work that is begun later finds them. Returns whether they now lie elsewhere than before.
    pub(crate) fn send(&mut self, words: &[u32]) -> Result<bool> {
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let moved = bytes.len() > self.target.bytes();
        if moved {
            self.device.synchronize()?;
            *self = Self::with_room(&self.device, words.len().next_power_of_two())?;
        }
        let target = self.target.pointer();
        let (stage, sent) = &mut self.stages[self.next];
        if let Some(sent) = sent {
            self.device.wait(sent)?;
        }
        stage.write(bytes);
        *sent = Some(stage.send(target, bytes.len())?);
        self.next = (self.next + 1) % MAX_STEPS_IN_FLIGHT;
        Ok(moved)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // Page-locked memory must not be freed while it travels.
        let _ = self.device.synchronize();
    }
}

/// Chosen tokens, on their way from the device.
#[derive(Debug)]
pub(crate) struct Choices {
    device: Rc<Device>,
    stages: Vec<Pinned>,
    /// Oldest first: the stage, how many, and when they are there.
    under_way: VecDeque<(usize, usize, CudaEvent)>,
    next: usize,
}

impl Choices {
    pub(crate) fn new(device: &Rc<Device>) -> Result<Self> {
        let bytes = MAX_SAMPLED * CHOICE_BYTES;
        let stages =
            (0..MAX_STEPS_IN_FLIGHT).map(|_| Pinned::allocate(device, bytes)).collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), stages, under_way: VecDeque::new(), next: 0 })
    }

    /// Begins to fetch `count` tokens that the work begun so far will have chosen: at `source` `[count, 2]` words, id and bits of the
    /// log-probability.
    pub(crate) fn fetch(&mut self, source: u64, count: usize) -> Result<()> {
        if self.under_way.len() == MAX_STEPS_IN_FLIGHT {
            let detail = format!("{MAX_STEPS_IN_FLIGHT} steps are in flight and were not asked about");
            return Err(Error::Shape { op: "sample", detail });
        }
        let arrived = self.stages[self.next].receive(source, count * CHOICE_BYTES)?;
        self.under_way.push_back((self.next, count, arrived));
        self.next = (self.next + 1) % MAX_STEPS_IN_FLIGHT;
        Ok(())
    }

    /// Whether the oldest have arrived.
    pub(crate) fn have_arrived(&self) -> Result<bool> {
        self.under_way.front().map_or(Ok(true), |(_, _, arrived)| self.device.has_come_to(arrived))
    }

    /// Nobody will ask for them any more; they have arrived.
    pub(crate) fn forget(&mut self) {
        self.under_way.clear();
    }

    /// Waits for the oldest.
    pub(crate) fn take(&mut self) -> Result<Vec<Choice>> {
        let (stage, count, arrived) = self.under_way.pop_front().ok_or_else(crate::sample::nothing_asked)?;
        self.device.wait(&arrived)?;
        let words = self.stages[stage].read(count * CHOICE_BYTES);
        let choice = |bytes: &[u8; CHOICE_BYTES]| {
            let [a, b, c, d, e, f, g, h] = *bytes;
            Choice { id: u32::from_le_bytes([a, b, c, d]), logprob: f32::from_le_bytes([e, f, g, h]) }
        };
        Ok(words.as_chunks().0.iter().map(choice).collect())
    }
}

impl Drop for Choices {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
    }
}
