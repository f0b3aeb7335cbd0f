//! Recorded steps: CUDA graphs, one for each size of step that was seen before.

use std::collections::{HashMap, HashSet};

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::device::{Device, failed};
use super::step::Sizes;
use crate::{Error, Result};

/// The graphs.
#[derive(Default)]
pub(crate) struct Records {
    graphs: HashMap<Sizes, Record>,
    /// Sizes that ran once: everything that the first run prepares is there, so the second may be recorded.
    seen: HashSet<Sizes>,
}

/// A recorded step.
pub(crate) struct Record {
    graph: CudaGraph,
    /// Where it leaves the tokens that it chooses, if it does.
    chosen: Option<u64>,
}

/// What to do with a step.
pub(crate) enum Course {
    /// Call the ops.
    Run,
    /// Call the ops and record them, then replay.
    Record,
    /// Replay.
    Replay,
}

impl Records {
    /// What to do with a step of these sizes.
    pub(crate) fn course(&mut self, sizes: Sizes) -> Course {
        if self.graphs.contains_key(&sizes) {
            Course::Replay
        } else if self.seen.insert(sizes) {
            Course::Run
        } else {
            Course::Record
        }
    }

    /// Replays the record of these sizes: where it leaves the tokens that it chooses, if it does.
    pub(crate) fn replay(&self, sizes: Sizes) -> Result<Option<u64>> {
        let Some(record) = self.graphs.get(&sizes) else { return Ok(None) };
        record.graph.launch().map_err(|e| failed("replaying a step", e))?;
        Ok(record.chosen)
    }

    /// Keeps a record.
    pub(crate) fn keep(&mut self, sizes: Sizes, record: Record) {
        self.graphs.insert(sizes, record);
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.graphs.clear();
        self.seen.clear();
    }
}

impl Record {
    pub(crate) fn new(graph: CudaGraph, chosen: Option<u64>) -> Self {
        Self { graph, chosen }
    }
}

/// Begins to record what this thread does on the device's stream.
pub(crate) fn begin(device: &Device) -> Result<()> {
    device
        .stream()
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(|e| failed("recording a step", e))
}

/// Ends it. Called also after a failure in between, so that the stream can be used again.
pub(crate) fn end(device: &Device) -> Result<CudaGraph> {
    let graph = device
        .stream()
        .end_capture(CUgraphInstantiate_flags(0))
        .map_err(|e| failed("recording a step", e))?;
    graph.ok_or_else(|| Error::Device { what: "recording a step".into(), why: "nothing was recorded".into() })
}
