//! What shares of a model take of a device's memory: measured on one layer of one unit, and computed for the rest.

use engine::{MemoryNeeds, units};
use kernels::{BLOCK_TOKENS, Backend, CHOSEN_COLS, DType};

use crate::error::Result;
use crate::names::Tensor;
use crate::source::{ModelSource, StepSize};
use crate::weights::{Weights, ffn_width};

/// Activations where the options name no largest step.
const USUAL_STEP: StepSize = StepSize { rows: 512, sampled: 64 };

impl ModelSource {
    /// What shares of this model take on `backend`. Loads one layer of one unit, since only the backend knows how it keeps
    /// weights.
    pub fn needs<B: Backend>(&self, backend: &B) -> Result<MemoryNeeds> {
        let shape = &self.config.shape;
        let units = units(shape);
        let dtype = self.options.dtype;
        let layer_unit = Weights::sample(backend, self.cut(&units), dtype)?.bytes(backend);
        let largest = |size: &dyn Fn(&engine::Unit) -> usize| units.iter().map(size).max().unwrap_or(0);
        let vocab = largest(&|unit| unit.vocab.len());
        let ffn = largest(&ffn_width);

        let f32 = DType::F32.size();
        let (hidden, head, compute) = (shape.hidden, shape.head_dim, dtype.size());
        let StepSize { rows, sampled } = self.options.largest_step.unwrap_or(USUAL_STEP);
        let (rows, sampled) = (backend.padded_rows(rows), backend.padded_rows(sampled));
        let heads = shape.group() * head;
        // As `forward::Activations` has them. A rank has a partial sum for each of its sub-trees: one or two, where units are shared
        // out evenly. One message to the next stage is under way.
        let of_unit = rows * ((heads + 2 * head) * f32 + 2 * heads * compute + ffn * (2 * f32 + compute))
            + sampled * vocab * f32;
        let of_rank = rows * (hidden * (5 * f32 + compute) + head * f32)
            + sampled * (2 * hidden + shape.vocab + CHOSEN_COLS) * f32;
        let norms = (2 * shape.layers + 1) * hidden * f32;

        let one = self.kv_shape(1, 1);
        Ok(MemoryNeeds {
            layers: shape.layers as u32,
            layer_unit: layer_unit as u64,
            embedding_unit: (vocab * hidden * compute) as u64,
            // bf16 weights stay bf16 under f32.
            head_unit: (vocab * hidden * self.origin.element_bytes(Tensor::Head).min(compute)) as u64,
            activation_unit: of_unit as u64,
            rank: (of_rank + norms) as u64,
            kv_token: backend.kv_block_bytes(one).div_ceil(BLOCK_TOKENS) as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Executor, ModelOptions};
    use comm::{MeshCollective, local_group};
    use kernels::Cpu;
    use std::path::Path;

    #[test]
    fn what_is_computed_is_what_is_loaded() {
        for dtype in [DType::Bf16, DType::F32] {
            let options = ModelOptions {
                dtype,
                kv_dtype: dtype,
                max_context: None,
                kv_memory: Some(1 << 20),
                largest_step: None,
                steps_in_flight: 1,
                progress: false,
            };
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/yi-nano");
            let source = ModelSource::open(&dir, options).unwrap();
            let backend = Cpu::new(1).unwrap();
            let needs = source.needs(&backend).unwrap();
            // The first unit is the largest: yi-nano's FFN is five groups of columns over four units.
            let ranges = engine::rank_ranges(4, 4).unwrap();
            let collective = MeshCollective::new(local_group(4).remove(0), ranges.clone()).unwrap();
            let executor = source.executor(backend, &ranges, collective).unwrap();
            assert_eq!(u64::from(needs.layers) * needs.layer_unit + needs.head_unit, executor.weight_bytes());
            // Keys are kept in columns of whole panels, so they may take more than their values.
            let token = 2 * source.config.shape.head_dim * dtype.size();
            assert!((token..=2 * token).contains(&(needs.kv_token as usize)), "{needs:?}");
        }
    }
}
