//! What a worker read in its checkpoint: equal on all workers of a group.

use std::fmt;

use engine::MemoryNeeds;

use crate::convert::{self, Malformed};
use crate::proto;

/// Shard units of any model that is served.
const MAX_UNITS: u32 = 1024;
const MAX_EOS_TOKENS: usize = 256;

/// The model as a worker has it, before any weight is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelReport {
    /// Name for people.
    pub name: String,
    /// Ids are below this.
    pub vocabulary: u32,
    /// Positions that the model was made for.
    pub max_context: u32,
    /// Shard units: the largest width.
    pub units: u32,
    /// Tokens of a KV block.
    pub block_size: u32,
    /// Ids that end a sequence.
    pub eos: Vec<u32>,
    /// Model, data types, instruction path: what the bits depend on.
    pub fingerprint: String,
    /// What its parts take of a device's memory.
    pub needs: MemoryNeeds,
}

/// The first field in which a worker's report is not the group's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    field: &'static str,
    worker: String,
    group: String,
}

impl ModelReport {
    /// Whether a worker with this report can serve in a group that has `group`'s. Names are for people and may differ.
    pub fn agree(&self, group: &ModelReport) -> Result<(), Difference> {
        let difference = |field, worker: &dyn fmt::Display, group: &dyn fmt::Display| {
            Err(Difference { field, worker: worker.to_string(), group: group.to_string() })
        };
        if self.fingerprint != group.fingerprint {
            return difference("fingerprint", &self.fingerprint, &group.fingerprint);
        }
        for (field, worker, group) in [
            ("vocabulary", self.vocabulary, group.vocabulary),
            ("max_context", self.max_context, group.max_context),
            ("units", self.units, group.units),
            ("block_size", self.block_size, group.block_size),
        ] {
            if worker != group {
                return difference(field, &worker, &group);
            }
        }
        if self.eos != group.eos {
            return difference("eos_token_ids", &format!("{:?}", self.eos), &format!("{:?}", group.eos));
        }
        Ok(())
    }
}

impl ModelReport {
    /// Whether requests of a cluster that serves `other` can go on with this: it is the same model, if maybe in other data types, on
    /// other instructions, or trained further, which the fingerprint tells.
    pub fn is_same_model(&self, other: &ModelReport) -> Result<(), Difference> {
        for (field, worker, group) in [
            ("vocabulary", self.vocabulary, other.vocabulary),
            ("units", self.units, other.units),
            ("layers", self.needs.layers, other.needs.layers),
        ] {
            if worker != group {
                return Err(Difference { field, worker: worker.to_string(), group: group.to_string() });
            }
        }
        if self.eos != other.eos {
            let [worker, group] = [&self.eos, &other.eos].map(|eos| format!("{eos:?}"));
            return Err(Difference { field: "eos_token_ids", worker, group });
        }
        Ok(())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "serves {} {}, the group {}", self.field, self.worker, self.group)
    }
}

impl From<ModelReport> for proto::ModelReport {
    fn from(report: ModelReport) -> Self {
        Self {
            name: report.name,
            vocabulary: report.vocabulary,
            max_context: report.max_context,
            units: report.units,
            block_size: report.block_size,
            eos_token_ids: report.eos,
            fingerprint: report.fingerprint,
            needs: Some(report.needs.into()),
        }
    }
}

impl TryFrom<proto::ModelReport> for ModelReport {
    type Error = Malformed;

    fn try_from(report: proto::ModelReport) -> Result<Self, Malformed> {
        let proto::ModelReport {
            name,
            vocabulary,
            max_context,
            units,
            block_size,
            eos_token_ids,
            fingerprint,
            needs,
        } = report;
        convert::check("model.vocabulary", vocabulary > 0, "is 0")?;
        convert::check("model.max_context", max_context > 0, "is 0")?;
        convert::check("model.units", (1..=MAX_UNITS).contains(&units), "is out of range")?;
        convert::check("model.block_size", block_size > 0, "is 0")?;
        convert::check("model.eos_token_ids", eos_token_ids.len() <= MAX_EOS_TOKENS, "has too many")?;
        Ok(Self {
            name: convert::text("model.name", name)?,
            vocabulary,
            max_context,
            units,
            block_size,
            eos: eos_token_ids,
            fingerprint: convert::text("model.fingerprint", fingerprint)?,
            needs: convert::present("model.needs", needs)?.try_into()?,
        })
    }
}
