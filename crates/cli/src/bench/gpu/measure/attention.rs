//! Attention by itself: its kernels over keys and values that are too many for caches.

use anyhow::Result;
use engine::ModelShape;
use kernels::{
    BLOCK_TOKENS, Backend, Batch, Cuda, CudaOptions, DType, Draw, KvShape, SampledRow, Slice, Token,
};

use crate::bench::gpu::counts::kv_layer_bytes;
use crate::bench::gpu::report::Attention;
use crate::bench::spread::Spread;

/// Bytes of keys and values, in as many layers as that takes: far more than caches hold.
const KV_BYTES: u64 = 1 << 30;
/// Runs of a measurement, so that the time between two of them does not count.
const RUNS: usize = 8;

/// Times the attention of a layer, of `batch` sequences that get the last of their `context` tokens: at least `steps` of them.
pub(super) fn measure(
    options: &CudaOptions,
    shape: &ModelShape,
    batch: u32,
    context: u32,
    steps: u32,
) -> Result<Attention> {
    let mut cuda = Cuda::open(options.clone())?;
    let kv_bytes = u64::from(batch) * u64::from(context) * kv_layer_bytes(shape);
    let layers = (KV_BYTES.div_ceil(kv_bytes) as usize).clamp(1, shape.layers);
    let kv_shape = KvShape {
        layers,
        units: shape.kv_heads,
        group: shape.group(),
        head_dim: shape.head_dim,
        dtype: DType::Bf16,
    };
    let (batch_size, each) = (batch as usize, (context as usize).div_ceil(BLOCK_TOKENS));
    let kv = cuda.kv_cache(kv_shape, batch_size * each)?;
    let slice = |seq| Slice {
        start: context as usize - 1,
        len: 1,
        blocks: (0..each).map(|i| (i * batch_size + seq) as u32).collect(),
    };
    let sampled = (0..batch_size).map(|row| SampledRow { row, slot: None, draw: Draw::GREEDY }).collect();
    let batch_of_slices = Batch { slices: (0..batch_size).map(slice).collect() };
    let step = cuda.step(vec![Token::Id(0); batch_size], batch_of_slices, sampled);
    let columns = shape.heads * shape.head_dim;
    let q = cuda.buffer(DType::Bf16, step.rows, columns)?;
    let mut out = cuda.buffer(DType::Bf16, step.rows, columns)?;
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let mut run = |cuda: &mut Cuda| {
        cuda.run(&step, true, |cuda| {
            (0..layers).try_for_each(|layer| cuda.attend(&step, &q, layer, &kv, scale, &mut out))
        })
    };
    // The first runs, the second is recorded, the third is replayed.
    for _ in 0..3 {
        run(&mut cuda)?;
    }
    let mut times = Vec::new();
    for _ in 0..(steps as usize).div_ceil(RUNS * layers) + 2 {
        let begun = cuda.moment()?;
        for _ in 0..RUNS {
            run(&mut cuda)?;
        }
        times.push(1e3 * cuda.moment()?.seconds_since(&begun)? / (RUNS * layers) as f64);
    }
    // What was recorded names memory that goes now.
    cuda.reset();
    let ms = Spread::of(times);
    let gb_s = kv_bytes as f64 / ms.median / 1e6;
    Ok(Attention { batch, context, ms, kv_bytes, gb_s, share: 0.0 })
}
