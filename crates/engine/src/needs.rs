//! What shares of a model take of a device's memory: decides how narrow a group may be.

use std::ops::Range;

/// Bytes that a model's parts take, as workers measured them on their device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryNeeds {
    /// Decoder layers; at least 1.
    pub layers: u32,
    /// The largest unit's weights in one layer.
    pub layer_unit: u64,
    /// Its rows of the embedding, which the first stage holds.
    pub embedding_unit: u64,
    /// Its rows of the head, which the last stage holds.
    pub head_unit: u64,
    /// Its activations.
    pub activation_unit: u64,
    /// What a rank has whatever units it holds: norms and its other activations.
    pub rank: u64,
    /// Keys and values of one token, in one layer of one unit.
    pub kv_token: u64,
}

impl MemoryNeeds {
    /// The layers of each of `stages` stages, such that all take about as long; none if there are more stages than layers. A
    /// step's time goes with the weights that it reads: the head counts as so many layers as it has bytes.
    pub fn stage_layers(&self, stages: usize) -> Option<Vec<Range<usize>>> {
        let layers = self.layers as usize;
        if stages == 0 || stages > layers {
            return None;
        }
        let cost = self.layer_unit.max(1) as f64;
        let each = (layers as f64 + self.head_unit as f64 / cost) / stages as f64;
        let mut start = 0;
        let stage = |stage: usize| {
            // Every stage has a layer, those behind it too.
            let end = (each * (stage + 1) as f64).round() as usize;
            let end =
                if stage + 1 == stages { layers } else { end.clamp(start + 1, layers + 1 + stage - stages) };
            let range = start..end;
            start = end;
            range
        };
        Some((0..stages).map(stage).collect())
    }

    /// Units of a stage that fit beside the keys and values of `tokens` tokens into `memory` bytes, of which the KV cache may
    /// take `kv_memory`.
    pub fn capacity(&self, stage: &Range<usize>, tokens: u64, memory: u64, kv_memory: u64) -> u64 {
        let layers = stage.len() as u64;
        let kv = self.kv_token.saturating_mul(layers).saturating_mul(tokens);
        let mut unit = self.layer_unit.saturating_mul(layers).saturating_add(self.activation_unit);
        if stage.start == 0 {
            unit = unit.saturating_add(self.embedding_unit);
        }
        if stage.end == self.layers as usize {
            unit = unit.saturating_add(self.head_unit);
        }
        let fitting = |memory: u64, unit: u64| memory.checked_div(unit).unwrap_or(u64::MAX);
        match memory.checked_sub(self.rank) {
            Some(memory) => fitting(memory, unit.saturating_add(kv)).min(fitting(kv_memory, kv)),
            None => 0,
        }
    }

    /// Bytes that `units` units of all layers take, with keys and values of `tokens` tokens.
    pub fn total(&self, units: u64, tokens: u64) -> u64 {
        let layer = self.layer_unit.saturating_add(self.kv_token.saturating_mul(tokens));
        let unit = layer
            .saturating_mul(self.layers.into())
            .saturating_add(self.embedding_unit)
            .saturating_add(self.head_unit)
            .saturating_add(self.activation_unit);
        unit.saturating_mul(units).saturating_add(self.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NEEDS: MemoryNeeds = MemoryNeeds {
        layers: 10,
        layer_unit: 100,
        embedding_unit: 50,
        head_unit: 200,
        activation_unit: 7,
        rank: 30,
        kv_token: 2,
    };

    #[test]
    fn the_head_counts_as_layers() {
        assert_eq!(NEEDS.stage_layers(1).map(|stages| stages[0].clone()), Some(0..10));
        assert_eq!(NEEDS.stage_layers(2), Some(vec![0..6, 6..10]));
        assert_eq!(NEEDS.stage_layers(11), None);
        assert_eq!(NEEDS.stage_layers(0), None);
    }

    #[test]
    fn weights_and_keys_share_the_memory() {
        // One unit: 10 × 100 + 7 + 50 + 200 = 1257, and 20 for a token.
        let capacity = |tokens, memory, kv| NEEDS.capacity(&(0..10), tokens, memory, kv);
        assert_eq!(capacity(10, 30 + 2 * 1457, u64::MAX), 2);
        assert_eq!(capacity(10, 30 + 2 * 1457 - 1, u64::MAX), 1);
        assert_eq!(capacity(10, u64::MAX, 399), 1);
        assert_eq!(capacity(10, 29, u64::MAX), 0);
        assert_eq!(capacity(u64::MAX, u64::MAX, u64::MAX), 0);
        assert_eq!(NEEDS.total(2, 10), 30 + 2 * 1457);
        // A stage in the middle has neither embedding nor head.
        assert_eq!(NEEDS.capacity(&(3..5), 0, 30 + 207, 0), 1);
        let nothing = MemoryNeeds { layers: 1, ..MemoryNeeds::default() };
        assert_eq!(nothing.capacity(&(0..1), 10, 0, 0), u64::MAX);
    }

    proptest! {
        #[test]
        fn stages_tile_the_layers(layers in 1u32..200, stages in 1usize..30, head in 0u64..100_000) {
            let needs = MemoryNeeds { layers, head_unit: head, ..NEEDS };
            match needs.stage_layers(stages) {
                None => prop_assert!(stages > layers as usize),
                Some(ranges) => {
                    prop_assert_eq!(ranges.len(), stages);
                    prop_assert!(ranges.iter().all(|range| !range.is_empty()));
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                    prop_assert_eq!((ranges[0].start, ranges[stages - 1].end), (0, layers as usize));
                }
            }
        }
    }
}
