//! What a step must read and compute at least: its bytes of weights and KV, and its operations.

use engine::ModelShape;
use model::config::Quantization;

/// Bytes of an element of KV and of a plain weight: bf16.
const BF16_BYTES: u64 = 2;
/// Of a scale of quantised weights.
const SCALE_BYTES: u64 = 4;

/// How the projections of a model are kept on the GPU; the head and the embedding are bf16 but for fp8, where the head is too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kept {
    Bf16,
    /// A byte each, and for each row a scale.
    Fp8,
    /// So many bits each, and for each row and group a scale and a zero point of a byte.
    Quantized(Quantization),
}

/// Bytes of all matrices that multiply a token's activations: what a decoding step reads of weights. Without the padding of matrices
/// that do not fill the kernels' tiles (16 rows, 64 or 128 columns in each unit).
pub(super) fn weight_bytes(shape: &ModelShape, kept: Kept) -> u64 {
    let matrix = |[rows, cols]: [usize; 2], kept| {
        let elements = (rows * cols) as u64;
        match kept {
            Kept::Bf16 => elements * BF16_BYTES,
            Kept::Fp8 => elements + rows as u64 * SCALE_BYTES,
            Kept::Quantized(how) => {
                elements * how.bits as u64 / 8 + (rows * how.groups(cols)) as u64 * (SCALE_BYTES + 1)
            }
        }
    };
    let units = shape.kv_heads as u64;
    let head = match kept {
        Kept::Quantized(_) => Kept::Bf16,
        other => other,
    };
    let stacked: u64 = projections(shape).iter().map(|&size| matrix(size, kept)).sum();
    // Matrices that units hold side by side have a scale for each row in every unit.
    let repeated = match kept {
        Kept::Fp8 => 2 * (units - 1) * shape.hidden as u64 * SCALE_BYTES,
        _ => 0,
    };
    shape.layers as u64 * (stacked + repeated) + matrix([shape.vocab, shape.hidden], head)
}

/// Bytes of keys and values of a token, all layers together.
pub(super) fn kv_token_bytes(shape: &ModelShape) -> u64 {
    kv_layer_bytes(shape) * shape.layers as u64
}

/// Likewise, of a layer.
pub(super) fn kv_layer_bytes(shape: &ModelShape) -> u64 {
    2 * (shape.kv_heads * shape.head_dim) as u64 * BF16_BYTES
}

/// Operations of reading a prompt of `tokens` tokens: two for each weight of the projections and each token, those of causal attention
/// (two products of every query with every key up to its own position), and the head once.
pub(super) fn prefill_flop(shape: &ModelShape, tokens: u64) -> f64 {
    let weights: usize = projections(shape).iter().map(|[rows, cols]| rows * cols).sum();
    let linears = 2.0 * (shape.layers * weights) as f64 * tokens as f64;
    let pairs = tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    let attention = 4.0 * (shape.layers * shape.heads * shape.head_dim) as f64 * pairs;
    linears + attention + 2.0 * (shape.vocab * shape.hidden) as f64
}

/// Parameters of a model whose head is not its embedding.
pub(super) fn parameters(shape: &ModelShape) -> u64 {
    let layer: usize =
        projections(shape).iter().map(|[rows, cols]| rows * cols).sum::<usize>() + 2 * shape.hidden;
    (shape.layers * layer + shape.hidden + 2 * shape.vocab * shape.hidden) as u64
}

/// Rows and columns of a layer's matrices: queries, keys and values; attention's output; gate and up; down.
fn projections(shape: &ModelShape) -> [[usize; 2]; 4] {
    let queries = shape.heads * shape.head_dim;
    [
        [queries + 2 * shape.kv_heads * shape.head_dim, shape.hidden],
        [shape.hidden, queries],
        [2 * shape.ffn, shape.hidden],
        [shape.hidden, shape.ffn],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Config;
    use model::config::Preset;

    fn yi_34b() -> ModelShape {
        Config::preset(Preset::Yi34B).shape
    }

    fn quantized(bits: usize) -> Kept {
        let config = Config::preset(Preset::Yi34B).with_quantization(Some(bits)).unwrap();
        Kept::Quantized(config.quantization.unwrap())
    }

    /// A layer of Yi-34B has 102,760,448 weights in q and o, 14,680,064 in k and v, 440,401,920 in the FFN; the head has 458,752,000.
    #[test]
    fn bytes_of_a_step_of_yi_34b() {
        let shape = yi_34b();
        assert_eq!(weight_bytes(&shape, Kept::Bf16), 67_858_595_840);
        // Half of it, and a scale of 4 bytes for 9216 + 40960 rows, and for 7168 rows in each of 8 units, twice; of 64000 rows.
        let scales = 60 * (50_176 + 2 * 8 * 7168) * 4 + 64_000 * 4;
        assert_eq!(weight_bytes(&shape, Kept::Fp8), 33_929_297_920 + scales);
        // Half a byte and 5 bytes for 128, of 60 · 557,842,432 weights, and the head in bf16.
        assert_eq!(weight_bytes(&shape, quantized(4)), 16_735_272_960 + 1_307_443_200 + 917_504_000);
        assert_eq!(weight_bytes(&shape, quantized(8)), 33_470_545_920 + 1_307_443_200 + 917_504_000);
        assert_eq!(kv_token_bytes(&shape), 245_760);
        assert_eq!(kv_layer_bytes(&shape) * 200_000, 819_200_000);
        assert_eq!(parameters(&shape), 34_388_917_248);
    }

    /// 67.9 GFLOP for a token and 1.72 MFLOP for each token of its context.
    #[test]
    fn operations_of_a_prompt_of_yi_34b() {
        let shape = yi_34b();
        let of_one = 2.0 * 33_470_545_920.0 + 1_720_320.0 + 917_504_000.0;
        assert_eq!(prefill_flop(&shape, 1), of_one);
        let of_4096 = 66_941_091_840.0 * 4096.0 + 1_720_320.0 * 8_390_656.0 + 917_504_000.0;
        assert_eq!(prefill_flop(&shape, 4096), of_4096);
        assert!((of_4096 / 1e12 - 288.6).abs() < 0.1);
    }
}
