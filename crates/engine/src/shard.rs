//! Shard units: how a model is cut so that any width gives the same bits.
//!
//! A model is cut into as many units as it has KV heads. A unit is one KV head, the query heads that share it,
//! a run of FFN columns and a run of vocabulary rows. A tensor rank holds a contiguous range of units; the
//! ranges may be uneven, so every width from 1 to the number of units is valid.

use std::ops::Range;

/// FFN columns of a unit end on a multiple of this where the model is large enough: the group size of the
/// publisher's quantised checkpoints, so that no group is cut.
const FFN_GROUP: usize = 128;

/// The sizes of a model that the shard plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads: the number of units.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Columns of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
}

impl ModelShape {
    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// One unit's share of every layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Position among the units, and the index of its KV head.
    pub index: usize,
    /// Its query heads.
    pub heads: Range<usize>,
    /// Its FFN columns; may be empty where the FFN is narrower than the number of units.
    pub ffn: Range<usize>,
    /// Its vocabulary rows.
    pub vocab: Range<usize>,
}

/// A width that the model cannot be cut to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// No rank may be without a unit.
    #[error("{width} workers asked for, but the model has {units} units (KV heads): use 1 to {units}")]
    Width {
        /// Ranks asked for.
        width: usize,
        /// Units that there are.
        units: usize,
    },
}

/// Cuts a model into its units, in order.
pub fn units(shape: &ModelShape) -> Vec<Unit> {
    let count = shape.kv_heads;
    let group = ffn_group(shape.ffn, count);
    let ffn_groups = shape.ffn.div_ceil(group);
    (0..count)
        .map(|index| {
            let ffn = share(ffn_groups, count, index);
            Unit {
                index,
                heads: index * shape.group()..(index + 1) * shape.group(),
                ffn: (ffn.start * group).min(shape.ffn)..(ffn.end * group).min(shape.ffn),
                vocab: share(shape.vocab, count, index),
            }
        })
        .collect()
}

/// The units of each rank of a group of `width` ranks: contiguous, complete, as even as can be.
pub fn rank_ranges(units: usize, width: usize) -> Result<Vec<Range<usize>>, ShardError> {
    if width == 0 || width > units {
        return Err(ShardError::Width { width, units });
    }
    Ok((0..width).map(|rank| share(units, width, rank)).collect())
}

/// The largest power of two up to [`FFN_GROUP`] that still gives every unit a group.
fn ffn_group(ffn: usize, units: usize) -> usize {
    let mut group = FFN_GROUP;
    while group > 1 && ffn.div_ceil(group) < units {
        group /= 2;
    }
    group
}

/// Part `index` of `total` cut into `parts` runs, the longer ones first.
fn share(total: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, longer) = (total / parts, total % parts);
    let start = index * each + index.min(longer);
    start..start + each + usize::from(index < longer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape(kv_heads: usize, group: usize, ffn: usize, vocab: usize) -> ModelShape {
        ModelShape { hidden: 64, layers: 1, heads: kv_heads * group, kv_heads, head_dim: 16, ffn, vocab }
    }

    #[test]
    fn yi_34b_has_eight_equal_units() {
        let units = units(&shape(8, 7, 20480, 64000));
        assert_eq!(units.len(), 8);
        assert!(units.iter().all(|u| u.heads.len() == 7 && u.ffn.len() == 2560 && u.vocab.len() == 8000));
    }

    #[test]
    fn yi_6b_ffn_is_86_groups_over_four_units() {
        let columns: Vec<_> = units(&shape(4, 8, 11008, 64000)).iter().map(|u| u.ffn.len()).collect();
        assert_eq!(columns, [22 * 128, 22 * 128, 21 * 128, 21 * 128]);
    }

    #[test]
    fn a_width_outside_one_to_units_is_refused() {
        assert_eq!(rank_ranges(4, 5), Err(ShardError::Width { width: 5, units: 4 }));
        assert!(rank_ranges(4, 0).is_err());
    }

    fn tiles(ranges: impl Iterator<Item = Range<usize>>, total: usize) -> bool {
        let mut next = 0;
        for range in ranges {
            if range.start != next || range.end < range.start {
                return false;
            }
            next = range.end;
        }
        next == total
    }

    proptest! {
        #[test]
        fn units_and_ranks_tile_the_model(
            kv in 1usize..20, group in 1usize..9, ffn in 1usize..5000, vocab in 20usize..5000, width in 1usize..20,
        ) {
            let units = units(&shape(kv, group, ffn, vocab));
            prop_assert!(tiles(units.iter().map(|u| u.heads.clone()), kv * group));
            prop_assert!(tiles(units.iter().map(|u| u.ffn.clone()), ffn));
            prop_assert!(tiles(units.iter().map(|u| u.vocab.clone()), vocab));
            if let Ok(ranges) = rank_ranges(kv, width) {
                prop_assert!(ranges.iter().all(|r| !r.is_empty()));
                prop_assert!(tiles(ranges.into_iter(), kv));
            } else {
                prop_assert!(width > kv);
            }
        }
    }
}
