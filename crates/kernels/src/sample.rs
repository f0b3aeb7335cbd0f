//! Sampling: a pure function of logits, parameters and position.
//!
//! The random number is a hash of (seed, position), not the state of a generator, so a sequence that is recomputed
//! after a failover draws the same tokens. exp and ln are our own or `libm`'s: the system's differ by
//! version and CPU.

use crate::Error;

/// How to choose one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the highest.
    pub temperature: f32,
    /// Only so many of the likeliest tokens count; 0: all.
    pub top_k: u32,
    /// Only the likeliest tokens that together have this probability count.
    pub top_p: f32,
    /// Of the random number.
    pub seed: u64,
    /// Index of the token within its sequence: the counter of the random number.
    pub position: u32,
}

impl Draw {
    /// The highest logit.
    pub const GREEDY: Draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, position: 0 };
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability under softmax(logits), before temperature and truncation.
    pub logprob: f32,
}

/// Chooses a token from its logits (one for each id, at least one).
///
/// Order of truncation, as in Hugging Face transformers: temperature, top-k, top-p.
pub fn sample(logits: &[f32], draw: &Draw) -> Choice {
    let best = argmax(logits);
    let id = if draw.temperature > 0.0 { choose(logits, logits[best], draw) } else { best };
    Choice { id: id as u32, logprob: logits[id] - log_sum_exp(logits, logits[best]) }
}

/// [`crate::Backend::choices`] without a [`crate::Backend::sample`] before it.
pub(crate) fn nothing_asked() -> Error {
    Error::Shape { op: "choices", detail: "nothing was sampled".into() }
}

/// The highest logit; the lowest id among equals. NaN is never highest, unless all are.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || (logits[best].is_nan() && !logit.is_nan()) {
            best = id;
        }
    }
    best
}

fn choose(logits: &[f32], max: f32, draw: &Draw) -> usize {
    let weight = |logit: f32| f64::from(exp((logit - max) / draw.temperature));
    let mut candidates: Vec<(usize, f64)> = logits.iter().map(|&logit| weight(logit)).enumerate().collect();
    // Heaviest first, the lower id first among equals: a total order, so that every sort gives the same.
    let heavier = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));

    let top_k = draw.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, heavier);
        candidates.truncate(top_k);
    }
    if draw.top_p < 1.0 {
        let total: f64 = ordered_sum(&mut candidates);
        // Tokens this light cannot together make up the tail that top-p cuts off: no need to sort them.
        let least = (1.0 - f64::from(draw.top_p)) * total / candidates.len() as f64;
        candidates.retain(|c| c.1 >= least);
        candidates.sort_unstable_by(heavier);
        let mut sum = 0.0;
        let enough = candidates.iter().position(|c| {
            sum += c.1;
            sum >= f64::from(draw.top_p) * total
        });
        candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
    }

    let total = ordered_sum(&mut candidates);
    let target = uniform(draw.seed, draw.position) * total;
    let mut sum = 0.0;
    for &(id, weight) in &candidates {
        sum += weight;
        if sum > target {
            return id;
        }
    }
    candidates.last().map_or(0, |c| c.0)
}

/// Brings the candidates into the order of their ids and adds their weights in it.
fn ordered_sum(candidates: &mut [(usize, f64)]) -> f64 {
    candidates.sort_unstable_by_key(|c| c.0);
    candidates.iter().map(|c| c.1).sum()
}

/// A number in [0, 1) with 53 random bits: SplitMix64's finaliser (Steele et al. 2014) over seed and position.
fn uniform(seed: u64, position: u32) -> f64 {
    let mixed = mix(mix(seed).wrapping_add(u64::from(position).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// ln Σ e^logit, summed in f64 over 16 lanes in a fixed order.
fn log_sum_exp(logits: &[f32], max: f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f64; LANES];
    let mut chunks = logits.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp(logit - max));
        }
    }
    for (lane, &logit) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f64::from(exp(logit - max));
    }
    (f64::from(max) + libm::log(lanes.iter().sum())) as f32
}

/// e^x for x ≤ 0 to about 2 ulp, 0 below −87: the polynomial of Cephes' `expf` without a branch, so that it vectorises.
fn exp(x: f32) -> f32 {
    let clamped = x.max(-87.0);
    let n = (clamped * std::f32::consts::LOG2_E + 0.5).floor();
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let e = (p * r * r + r + 1.0) * f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { e }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn draw(temperature: f32, top_k: u32, top_p: f32, seed: u64, position: u32) -> Draw {
        Draw { temperature, top_k, top_p, seed, position }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = libm::exp(f64::from(x));
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2.5e-7, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals_and_skips_nan() {
        let choice = sample(&[f32::NAN, 1.0, 3.0, 3.0], &Draw::GREEDY);
        assert_eq!(choice.id, 2);
    }

    #[test]
    fn logprob_is_of_the_plain_softmax() {
        let logits = [0.0, 2.0f32.ln(), 5.0f32.ln()];
        let choice = sample(&logits, &Draw::GREEDY);
        assert!((f64::from(choice.logprob) - libm::log(5.0 / 8.0)).abs() < 1e-6);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let mut counts = [0; 4];
        for position in 0..40_000 {
            counts[sample(&logits, &draw(1.0, 0, 1.0, 7, position)).id as usize] += 1;
        }
        for (id, count) in counts.into_iter().enumerate() {
            let expected = 4000.0 * (id + 1) as f64;
            // Five standard deviations.
            assert!((f64::from(count) - expected).abs() < 5.0 * expected.sqrt(), "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn truncation_keeps_only_the_likeliest(
            logits in prop::collection::vec(-6f32..6.0, 1..200), k in 0u32..20, p in 0.05f32..1.0, seed: u64, position: u32,
        ) {
            let choice = sample(&logits, &draw(0.8, k, p, seed, position));
            let mut sorted: Vec<(f32, usize)> = logits.iter().map(|l| l / 0.8).zip(0..).collect();
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            if k > 0 {
                sorted.truncate(k as usize);
            }
            let weights: Vec<f64> = sorted.iter().map(|(l, _)| libm::exp(f64::from(*l))).collect();
            let total: f64 = weights.iter().sum();
            let rank = sorted.iter().position(|(_, id)| *id == choice.id as usize);
            prop_assert!(rank.is_some(), "outside top-k");
            let before: f64 = weights[..rank.unwrap_or(0)].iter().sum();
            // The mass before a kept token has not reached top_p yet.
            prop_assert!(before <= f64::from(p) * total * (1.0 + 1e-5));
        }

        #[test]
        fn the_same_inputs_give_the_same_token(logits in prop::collection::vec(-6f32..6.0, 1..50), seed: u64, at: u32) {
            let draw = draw(1.0, 10, 0.9, seed, at);
            prop_assert_eq!(sample(&logits, &draw), sample(&logits, &draw));
        }
    }
}
