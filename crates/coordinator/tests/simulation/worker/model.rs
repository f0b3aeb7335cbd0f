//! The model of the simulation: the next token is a function of the fingerprint, the tokens so far, the sampling, and the position.

use engine::{Request, SamplingParams};

pub(crate) const VOCABULARY: u32 = 500;

/// What the tokens so far come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prefix(u64);

impl Prefix {
    /// No tokens yet.
    pub(crate) fn under(fingerprint: &str) -> Self {
        Self(fingerprint.bytes().fold(0x9E37_79B9_7F4A_7C15, |hash, byte| mix(hash ^ u64::from(byte))))
    }

    /// With another token.
    pub(crate) fn with(self, token: u32) -> Self {
        Self(mix(self.0 ^ u64::from(token)))
    }

    /// The token that follows.
    pub(crate) fn next(self, sampling: SamplingParams, position: u32) -> u32 {
        let chance = mix(sampling.seed ^ u64::from(position) ^ u64::from(sampling.temperature.to_bits()));
        (mix(self.0 ^ chance) % u64::from(VOCABULARY)) as u32
    }
}

/// A number of which every bit depends on every bit of `x` (the end of splitmix64).
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x ^ (x >> 31)).wrapping_add(0x9E37_79B9_7F4A_7C15)
}

/// What a request is answered if nothing goes wrong, in a context of so many tokens: after those of `before`, what comes under a
/// fingerprint.
pub(crate) fn answer(request: &Request, context: u32, before: &[u32], fingerprint: &str) -> Vec<u32> {
    let empty = Prefix::under(fingerprint);
    let mut prefix = request.prompt.iter().fold(empty, |prefix, token| prefix.with(*token));
    let mut answer: Vec<u32> = Vec::new();
    let prompt = request.prompt.len() as u32;
    let most = request.max_tokens.min(context.saturating_sub(prompt));
    for position in prompt..prompt + most {
        let token =
            before.get(answer.len()).copied().unwrap_or_else(|| prefix.next(request.sampling, position));
        prefix = prefix.with(token);
        answer.push(token);
        if request.stop_ids.contains(&token) {
            break;
        }
    }
    answer
}
