//! Conversions between the engine's types and their protobuf form.
//!
//! Plans and outputs are decoded within bounds: counts are checked before anything is allocated for them.

use bytes::{Buf, Bytes};
use engine::{
    BlockId, Epoch, SampledToken, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, StepOutput,
    StepPlan, Tokens,
};
use prost::Message;

use crate::proto;

/// Slices of a plan, and so sequences that run at once.
pub const MAX_SLICES: usize = 4096;
/// Bytes of a name, an address, a fingerprint, a reason.
pub const MAX_TEXT: usize = 4096;

/// A message that is not what the protocol says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {field} {problem}")]
pub struct Malformed {
    /// The field, with its path.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// Encodes a plan: once, for all ranks.
pub fn encode_plan(plan: &StepPlan) -> Bytes {
    let StepPlan { epoch, step, keep_sampled, slices } = plan;
    let slices = slices.iter().map(proto::SeqSlice::from).collect();
    let keep_sampled = *keep_sampled;
    proto::StepPlan { epoch: Some((*epoch).into()), step: step.0, slices, keep_sampled }
        .encode_to_vec()
        .into()
}

/// Decodes a plan.
pub fn decode_plan(encoded: Bytes) -> Result<StepPlan, Malformed> {
    let slices = count_field(encoded.clone(), SLICES_FIELD)?;
    check("plan.slices", slices <= MAX_SLICES, "has too many")?;
    let plan = proto::StepPlan::decode(encoded)
        .map_err(|error| malformed("plan", format!("does not decode: {error}")))?;
    Ok(StepPlan {
        epoch: epoch("plan.epoch", plan.epoch)?,
        step: StepId(plan.step),
        keep_sampled: plan.keep_sampled,
        slices: plan.slices.into_iter().map(SeqSlice::try_from).collect::<Result<_, _>>()?,
    })
}

/// The epoch in a field that must be there.
pub fn epoch(field: &'static str, epoch: Option<proto::Epoch>) -> Result<Epoch, Malformed> {
    Ok(present(field, epoch)?.into())
}

/// The value of a field that must be there.
pub fn present<T>(field: &'static str, value: Option<T>) -> Result<T, Malformed> {
    value.ok_or_else(|| malformed(field, "is missing"))
}

/// A text of bounded length.
pub fn text(field: &'static str, text: String) -> Result<String, Malformed> {
    check(field, text.len() <= MAX_TEXT, "is too long")?;
    Ok(text)
}

/// `Err` with `problem` unless `holds`.
pub fn check(field: &'static str, holds: bool, problem: &str) -> Result<(), Malformed> {
    if holds { Ok(()) } else { Err(malformed(field, problem)) }
}

fn malformed(field: &'static str, problem: impl Into<String>) -> Malformed {
    Malformed { field, problem: problem.into() }
}

impl From<Epoch> for proto::Epoch {
    fn from(epoch: Epoch) -> Self {
        Self { term: epoch.term, counter: epoch.counter }
    }
}

impl From<proto::Epoch> for Epoch {
    fn from(epoch: proto::Epoch) -> Self {
        Self { term: epoch.term, counter: epoch.counter }
    }
}

impl From<&SeqSlice> for proto::SeqSlice {
    fn from(slice: &SeqSlice) -> Self {
        let (tokens, last_sampled) = match &slice.tokens {
            Tokens::Ids(ids) => (ids.clone(), false),
            Tokens::LastSampled => (Vec::new(), true),
        };
        Self {
            seq: slice.seq.0,
            slot: slice.slot.0,
            start: slice.start,
            tokens,
            last_sampled,
            blocks: slice.blocks.iter().map(|block| block.0).collect(),
            sampling: slice.sampling.map(|Sampling { params, position }| proto::Sampling {
                temperature: params.temperature,
                top_k: params.top_k,
                top_p: params.top_p,
                seed: params.seed,
                position,
            }),
        }
    }
}

impl TryFrom<proto::SeqSlice> for SeqSlice {
    type Error = Malformed;

    fn try_from(slice: proto::SeqSlice) -> Result<Self, Malformed> {
        let proto::SeqSlice { seq, slot, start, tokens, blocks, sampling, last_sampled } = slice;
        let tokens = if last_sampled {
            check("plan.slices.tokens", tokens.is_empty(), "come with last_sampled")?;
            check("plan.slices.start", start > 0, "is 0, where nothing was sampled before")?;
            Tokens::LastSampled
        } else {
            check("plan.slices.tokens", !tokens.is_empty(), "is empty")?;
            Tokens::Ids(tokens)
        };
        check("plan.slices.blocks", !blocks.is_empty(), "is empty")?;
        let end = u32::try_from(tokens.len()).ok().and_then(|count| start.checked_add(count));
        check("plan.slices.start", end.is_some(), "is out of range")?;
        Ok(Self {
            seq: SeqId(seq),
            slot: SlotId(slot),
            start,
            tokens,
            blocks: blocks.into_iter().map(BlockId).collect(),
            sampling: sampling.map(|sampling| {
                let proto::Sampling { temperature, top_k, top_p, seed, position } = sampling;
                Sampling { params: SamplingParams { temperature, top_k, top_p, seed }, position }
            }),
        })
    }
}

impl From<StepOutput> for proto::StepOutput {
    fn from(output: StepOutput) -> Self {
        let token = |SampledToken { seq, id, logprob }| proto::SampledToken { seq: seq.0, id, logprob };
        Self {
            epoch: Some(output.epoch.into()),
            step: output.step.0,
            tokens: output.tokens.into_iter().map(token).collect(),
        }
    }
}

impl TryFrom<proto::StepOutput> for StepOutput {
    type Error = Malformed;

    fn try_from(output: proto::StepOutput) -> Result<Self, Malformed> {
        check("output.tokens", output.tokens.len() <= MAX_SLICES, "has too many")?;
        let token = |proto::SampledToken { seq, id, logprob }| SampledToken { seq: SeqId(seq), id, logprob };
        Ok(Self {
            epoch: epoch("output.epoch", output.epoch)?,
            step: StepId(output.step),
            tokens: output.tokens.into_iter().map(token).collect(),
        })
    }
}

/// Number of `slices` in `StepPlan`.
const SLICES_FIELD: u64 = 3;

/// How often a field occurs in an encoded message, without decoding it: an empty sub-message takes two bytes on the
/// wire and a hundred in memory, so the length of a message does not bound what it decodes to.
fn count_field(mut message: Bytes, field: u64) -> Result<usize, Malformed> {
    let mut count = 0;
    while message.has_remaining() {
        let key = varint(&mut message)?;
        let length = match key & 7 {
            0 => {
                varint(&mut message)?;
                0
            }
            1 => 8,
            2 => varint(&mut message)?,
            5 => 4,
            _ => return Err(malformed("plan", "has a field of an unknown wire type")),
        };
        match usize::try_from(length) {
            Ok(length) if length <= message.remaining() => message.advance(length),
            _ => return Err(malformed("plan", "is cut off")),
        }
        count += usize::from(key >> 3 == field);
    }
    Ok(count)
}

fn varint(message: &mut Bytes) -> Result<u64, Malformed> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = message.try_get_u8().map_err(|_| malformed("plan", "is cut off"))?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(malformed("plan", "has a number of more than 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> StepPlan {
        let params = SamplingParams { temperature: 0.7, top_k: 40, top_p: 0.9, seed: u64::MAX };
        let slice = SeqSlice {
            seq: SeqId(7),
            slot: SlotId(1),
            start: 30,
            tokens: Tokens::Ids(vec![5, 63_999]),
            blocks: vec![BlockId(0), BlockId(9)],
            sampling: Some(Sampling { params, position: 32 }),
        };
        let chunk = SeqSlice { seq: SeqId(8), sampling: None, ..slice.clone() };
        let ahead = SeqSlice { seq: SeqId(9), start: 1, tokens: Tokens::LastSampled, ..slice.clone() };
        StepPlan {
            epoch: Epoch { term: 3, counter: 1 },
            step: StepId(12),
            keep_sampled: true,
            slices: vec![slice, chunk, ahead],
        }
    }

    #[test]
    fn a_plan_survives_the_wire() {
        assert_eq!(decode_plan(encode_plan(&plan())), Ok(plan()));
    }

    #[test]
    fn an_output_survives_the_wire() {
        let token = SampledToken { seq: SeqId(7), id: 3, logprob: -0.5 };
        let output = StepOutput { epoch: plan().epoch, step: StepId(12), tokens: vec![token] };
        let encoded = proto::StepOutput::from(output.clone()).encode_to_vec();
        let decoded = proto::StepOutput::decode(encoded.as_slice()).unwrap();
        assert_eq!(StepOutput::try_from(decoded), Ok(output));
    }

    #[test]
    fn what_is_malformed_is_named() {
        let field = |encoded: Vec<u8>| decode_plan(encoded.into()).unwrap_err().to_string();
        assert_eq!(
            field(proto::StepPlan::default().encode_to_vec()),
            "malformed message: plan.epoch is missing"
        );
        let slices = vec![proto::SeqSlice::default()];
        let empty =
            proto::StepPlan { epoch: Some(proto::Epoch::default()), slices, ..proto::StepPlan::default() };
        assert_eq!(field(empty.encode_to_vec()), "malformed message: plan.slices.tokens is empty");
        let mut far = plan();
        far.slices[0].start = u32::MAX;
        assert_eq!(field(encode_plan(&far).to_vec()), "malformed message: plan.slices.start is out of range");
        let mut first = plan();
        first.slices[2].start = 0;
        assert_eq!(
            field(encode_plan(&first).to_vec()),
            "malformed message: plan.slices.start is 0, where nothing was sampled before"
        );
        let mut both = proto::StepPlan::decode(encode_plan(&plan())).unwrap();
        both.slices[2].tokens = vec![1];
        assert_eq!(
            field(both.encode_to_vec()),
            "malformed message: plan.slices.tokens come with last_sampled"
        );
    }

    #[test]
    fn slices_are_counted_before_they_are_decoded() {
        let bomb = [0x1a, 0x00].repeat(MAX_SLICES + 1);
        assert_eq!(decode_plan(bomb.into()).unwrap_err().field, "plan.slices");
    }

    #[test]
    fn no_prefix_of_a_plan_panics() {
        let encoded = encode_plan(&plan());
        for end in 0..encoded.len() {
            // Some prefixes end between two fields and are messages themselves, but never this plan.
            assert_ne!(decode_plan(encoded.slice(..end)), Ok(plan()));
        }
        assert!(decode_plan(Bytes::from_static(&[0x1a, 0xff, 0xff, 0xff, 0xff, 0xff])).is_err());
        assert!(decode_plan(Bytes::from_static(&[0x03])).is_err());
    }
}
