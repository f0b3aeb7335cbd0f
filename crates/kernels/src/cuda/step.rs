//! What the kernels read of a step: one run of 32-bit words, uploaded before the step begins.
//!
//! Where each part begins depends on the padded sizes alone, except for the block tables, which come last. So a recorded step is
//! right for every later step of the same sizes.

use super::attend::{LONG_TILE_ROWS, SHORT_ROWS, SPAN};
use crate::shape::BLOCK;
use crate::{Slice, Step, Token};

/// Batch sizes that decoding steps are padded to.
const BUCKETS: [usize; 18] = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Steps of more rows are never recorded.
pub(crate) const LARGEST_BUCKET: usize = BUCKETS[BUCKETS.len() - 1];
/// Words of a sampled row's parameters.
pub(crate) const DRAW_WORDS: usize = 6;
/// Where there is no token, or no slot.
const NOTHING: u32 = u32::MAX;
/// Marks a slot among token ids: the row's token is what was last kept for it.
const LAST_SAMPLED: u32 = 1 << 31;

/// What tells apart steps that one record cannot serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Sizes {
    pub(crate) rows: usize,
    pub(crate) slices: usize,
    /// Slices whose queries fit in one tile; each span of their keys is a piece of work.
    pub(crate) short_slices: usize,
    /// Tiles of queries of the other slices.
    pub(crate) long_tiles: usize,
    pub(crate) sampled: usize,
    /// Whether ids are kept, which on all ranks takes ops of its own.
    pub(crate) keeps: bool,
}

/// Where each part begins, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    /// `[rows]`: token ids below 2^31, slots with `LAST_SAMPLED`, or `NOTHING`.
    pub(crate) tokens: usize,
    /// `[rows]`: positions in their sequences, −1 where a row means nothing.
    pub(crate) positions: usize,
    /// `[rows]`: slices.
    pub(crate) row_slice: usize,
    /// `[slices + 1]`: first rows.
    pub(crate) slice_row: usize,
    /// `[slices]`: positions of the first rows.
    pub(crate) slice_start: usize,
    /// `[slices + 1]`: where block tables begin.
    pub(crate) table_offset: usize,
    /// `[short slices]`: which slices they are.
    pub(crate) short_slices: usize,
    /// `[short slices + 1]`: spans of keys of all short slices before it.
    pub(crate) span_offset: usize,
    /// `[1]`: the number of short slices.
    pub(crate) short_count: usize,
    /// `[long tiles, 2]`, on an even word: slice, and the tile's first query among the slice's rows × query heads.
    pub(crate) long_tiles: usize,
    /// `[sampled]`: rows.
    pub(crate) sampled: usize,
    /// `[sampled]`: slots that their ids are kept for, or `NOTHING`.
    pub(crate) slots: usize,
    /// `[sampled, DRAW_WORDS]`: temperature, top-k, top-p, seed low and high, position.
    pub(crate) draws: usize,
    /// Block tables, slice after slice.
    pub(crate) table: usize,
}

impl Parts {
    fn of(sizes: Sizes) -> Self {
        let mut end = 0;
        let mut part = |words: usize| {
            let start = end;
            end += words;
            start
        };
        Self {
            tokens: part(sizes.rows),
            positions: part(sizes.rows),
            row_slice: part(sizes.rows),
            slice_row: part(sizes.slices + 1),
            slice_start: part(sizes.slices),
            table_offset: part(sizes.slices + 1),
            short_slices: part(sizes.short_slices),
            span_offset: part(sizes.short_slices + 1),
            short_count: part(1),
            long_tiles: part(2 * sizes.long_tiles + 1),
            sampled: part(sizes.sampled),
            slots: part(sizes.sampled),
            draws: part(DRAW_WORDS * sizes.sampled),
            table: end,
        }
        .with_even_tiles()
    }

    /// The kernel reads tiles in pairs of words; a spare word lets them begin on an even one.
    fn with_even_tiles(mut self) -> Self {
        self.long_tiles = self.long_tiles.next_multiple_of(2);
        self
    }
}

/// A step as the kernels see it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub(crate) sizes: Sizes,
    pub(crate) parts: Parts,
    /// Spans of keys of all short slices: pieces of work, and partial results, for each unit.
    pub(crate) spans: usize,
    /// Queries of the largest short slice.
    pub(crate) short_rows: usize,
    /// All slices decode, so the step can be recorded for its sizes.
    pub(crate) decodes: bool,
    pub(crate) words: Vec<u32>,
}

/// Rows to run a step of `rows` decoding rows with.
pub(crate) fn bucket(rows: usize) -> usize {
    BUCKETS.into_iter().find(|&bucket| bucket >= rows).unwrap_or(rows)
}

/// Whether every row is a sequence's next token and is sampled from: then the step may be padded and recorded.
pub(crate) fn decodes(slices: &[Slice], sampled: usize) -> bool {
    !slices.is_empty() && slices.len() == sampled && slices.iter().all(|slice| slice.len == 1)
}

impl Plan {
    /// `group`: query heads of a unit.
    pub(crate) fn new(step: &Step, group: usize) -> Self {
        let slices = &step.batch.slices;
        let decodes = decodes(slices, step.sampled.len()) && step.rows <= LARGEST_BUCKET;
        let padded_slices = if decodes { step.rows } else { slices.len() };
        let is_short = |slice: &Slice| slice.len * group <= SHORT_ROWS;
        let short: Vec<usize> = (0..slices.len()).filter(|&i| is_short(&slices[i])).collect();
        let mut tiles: Vec<(usize, usize)> = slices
            .iter()
            .enumerate()
            .filter(|(_, slice)| !is_short(slice))
            .flat_map(|(i, slice)| (0..slice.len * group).step_by(LONG_TILE_ROWS).map(move |row| (i, row)))
            .collect();
        // The longest first, so that no multiprocessor begins one when the others are through.
        let keys =
            |&(slice, first): &(usize, usize)| slices[slice].start + (first + LONG_TILE_ROWS) / group.max(1);
        tiles.sort_by_key(|tile| std::cmp::Reverse(keys(tile)));
        let sizes = Sizes {
            rows: step.rows,
            slices: padded_slices,
            short_slices: if decodes && group <= SHORT_ROWS { step.rows } else { short.len() },
            long_tiles: tiles.len(),
            sampled: step.sampled_rows,
            keeps: step.keeps(),
        };
        let parts = Parts::of(sizes);
        let mut words = vec![0; parts.table];

        words[parts.tokens..][..sizes.rows].fill(NOTHING);
        words[parts.positions..][..sizes.rows].fill(u32::MAX);
        for (word, token) in words[parts.tokens..].iter_mut().zip(&step.tokens) {
            *word = match *token {
                Token::Id(id) if id < LAST_SAMPLED => id,
                Token::Id(_) => NOTHING, // no table has it
                Token::LastSampled(slot) => LAST_SAMPLED | slot,
            };
        }
        let mut row = 0;
        for (index, slice) in slices.iter().enumerate() {
            words[parts.slice_row + index] = row as u32;
            words[parts.slice_start + index] = slice.start as u32;
            words[parts.table_offset + index] = (words.len() - parts.table) as u32;
            for offset in 0..slice.len {
                words[parts.positions + row + offset] = (slice.start + offset) as u32;
                words[parts.row_slice + row + offset] = index as u32;
            }
            row += slice.len;
            let blocks = (slice.start + slice.len).div_ceil(BLOCK);
            words.extend_from_slice(&slice.blocks[..blocks]);
        }
        let table_words = (words.len() - parts.table) as u32;
        for index in slices.len()..=padded_slices {
            // A slice of padding has one row, at no position, and no keys.
            words[parts.slice_row + index] = (row + index - slices.len()) as u32;
            words[parts.table_offset + index] = table_words;
        }
        let mut spans = 0;
        for index in 0..sizes.short_slices {
            words[parts.span_offset + index] = spans;
            if let Some(&slice) = short.get(index) {
                words[parts.short_slices + index] = slice as u32;
                spans += (slices[slice].start + slices[slice].len).div_ceil(SPAN) as u32;
            } else {
                // Padding, without spans.
                words[parts.short_slices + index] = index as u32;
            }
        }
        words[parts.span_offset + sizes.short_slices] = spans;
        words[parts.short_count] = sizes.short_slices as u32;
        for (index, &(slice, first)) in tiles.iter().enumerate() {
            words[parts.long_tiles + 2 * index] = slice as u32;
            words[parts.long_tiles + 2 * index + 1] = first as u32;
        }
        for index in 0..sizes.sampled {
            let sampled = step.sampled.get(index);
            words[parts.sampled + index] = sampled.map_or(index, |sampled| sampled.row) as u32;
            words[parts.slots + index] = sampled.and_then(|sampled| sampled.slot).unwrap_or(NOTHING);
            if let Some(draw) = sampled.map(|sampled| sampled.draw) {
                words[parts.draws + DRAW_WORDS * index..][..DRAW_WORDS].copy_from_slice(&[
                    draw.temperature.to_bits(),
                    draw.top_k,
                    draw.top_p.to_bits(),
                    draw.seed as u32,
                    (draw.seed >> 32) as u32,
                    draw.position,
                ]);
            }
        }
        let short_rows = short.iter().map(|&i| slices[i].len * group).max().unwrap_or(0);
        Self { sizes, parts, spans: spans as usize, short_rows, decodes, words }
    }
}
