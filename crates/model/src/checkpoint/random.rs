//! Random weights: a stream of nearly normal numbers for each tensor, the same on every machine.
//!
//! SplitMix64 gives 64 bits; a number is the sum of their four 16-bit parts (Irwin–Hall), shifted and scaled.
//! That is close enough to a normal distribution for weights, and takes whole numbers and one product only.

/// The increment and the finalizer's factors of SplitMix64 (Steele, Lea and Flood, 2014).
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;
const FACTORS: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];
/// Offset and factor of the FNV-1a hash of 64 bits.
const FNV: [u64; 2] = [0xcbf2_9ce4_8422_2325, 0x0000_0100_0000_01b3];

/// A stream of random bits.
#[derive(Debug, Clone)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// The stream of a tensor, which depends on the seed and on its name alone.
    pub(crate) fn new(seed: u64, name: &str) -> Random {
        let hash = name.bytes().fold(FNV[0], |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(FNV[1]));
        Random { state: finalize(seed.wrapping_add(INCREMENT)) ^ hash }
    }

    /// The next number of mean 0 and standard deviation 1, none farther out than 3.5.
    pub(crate) fn normal(&mut self) -> f32 {
        /// Of the sum of four uniform whole numbers below 2^16: mean, and 1 / standard deviation.
        const MEAN: i32 = 2 * 65535;
        const SCALE: f32 = 1.0 / 37_837.227;
        let bits = self.bits();
        let sum = (0..4).map(|part| (bits >> (16 * part)) as u16 as i32).sum::<i32>();
        (sum - MEAN) as f32 * SCALE
    }

    /// The next word, all as likely.
    pub(crate) fn word(&mut self) -> u32 {
        (self.bits() >> 32) as u32
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(INCREMENT);
        finalize(self.state)
    }
}

fn finalize(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(FACTORS[0]);
    bits = (bits ^ (bits >> 27)).wrapping_mul(FACTORS[1]);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_nearly_normal() {
        let mut random = Random::new(1, "a");
        let numbers: Vec<f64> = (0..1_000_000).map(|_| f64::from(random.normal())).collect();
        let mean = |f: &dyn Fn(f64) -> f64| numbers.iter().map(|&x| f(x)).sum::<f64>() / numbers.len() as f64;
        assert!(mean(&|x| x).abs() < 5e-3);
        assert!((mean(&|x| x * x) - 1.0).abs() < 5e-3);
        assert!(mean(&|x| x.powi(3)).abs() < 2e-2);
        let within_one = mean(&|x| f64::from(u8::from(x.abs() < 1.0)));
        assert!((within_one - 0.683).abs() < 0.02, "{within_one}");
    }

    #[test]
    fn a_stream_is_its_seeds_and_its_names() {
        let start = |seed, name| {
            let mut random = Random::new(seed, name);
            [random.normal(), random.normal()]
        };
        assert_eq!(start(1, "a"), start(1, "a"));
        assert_ne!(start(1, "a"), start(2, "a"));
        assert_ne!(start(1, "a"), start(1, "b"));
    }
}
