//! Sizes that do not fit are errors, on every backend alike, and never a panic.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Device, block, cpus, ids_step, sampled_step, step};
use kernels::cpu::Path;
use kernels::{
    Backend, Batch, Cpu, DType, Draw, Error, HostBuffer, KvShape, MAX_SLOTS, Oracle, Partial, Result, Slice,
    SourceType, Step, Token, Tree,
};

fn assert_shape<T>(result: Result<T>) {
    match result {
        Err(Error::Shape { .. }) => {}
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("accepted"),
    }
}

fn kv_shape(layers: usize, head_dim: usize) -> KvShape {
    KvShape { layers, units: 1, group: 2, head_dim, dtype: DType::F32 }
}

fn slice(start: usize, len: usize, blocks: &[u32]) -> Slice {
    Slice { start, len, blocks: blocks.to_vec() }
}

fn rejects_bad_sizes<B: Device>(b: &mut B) {
    let data = vec![0u8; 4 * 64];
    let f32s = |rows, cols| block(&data[..rows * cols * 4], SourceType::F32, rows, cols);
    let buffer = |b: &B, rows, cols| b.buffer(DType::F32, rows, cols).unwrap();

    assert_shape(b.matrix(&[], DType::F32));
    assert_shape(b.matrix(&[f32s(2, 3)], DType::F32));
    assert_shape(b.matrix(&[f32s(2, 4), f32s(2, 6)], DType::F32));
    assert_shape(b.matrix(&[block(&data[..7], SourceType::F32, 1, 2)], DType::F32));
    assert_shape(b.table(block(&data, SourceType::F32, 1, 2), 0, DType::F32));
    assert_shape(b.vector(block(&data, SourceType::F32, usize::MAX, 2)));
    assert_shape(b.kv_cache(kv_shape(1, 15), 1));
    assert_shape(b.kv_cache(kv_shape(1, 1024), 1));

    let small = buffer(b, 2, 4);
    assert_shape(b.read_row(&small, 2));
    assert_shape(b.read_row(&b.buffer(DType::Bf16, 2, 4).unwrap(), 0));

    let table = b.table(f32s(4, 4), 0, DType::F32).unwrap();
    assert_shape(b.embed(&ids_step(b, &[0, 1, 2]), &table, &mut buffer(b, 2, 4)));
    assert_shape(b.embed(&ids_step(b, &[0]), &table, &mut buffer(b, 2, 5)));
    assert_shape(b.embed(&ids_step(b, &[0]), &table, &mut b.buffer(DType::Bf16, 2, 4).unwrap()));

    let (weight, long) = (buffer(b, 1, 4), buffer(b, 1, 5));
    assert_shape(b.rms_norm(3, &small, &weight, 1e-5, &mut buffer(b, 3, 4)));
    assert_shape(b.rms_norm(2, &small, &long, 1e-5, &mut buffer(b, 2, 4)));
    assert_shape(b.rms_norm(2, &small, &weight, 1e-5, &mut buffer(b, 1, 4)));
    assert_shape(b.add_rms_norm(2, &small, &mut buffer(b, 2, 3), &weight, 1e-5, &mut buffer(b, 2, 4)));

    let weights =
        [b.matrix(&[f32s(3, 4)], DType::F32).unwrap(), b.matrix(&[f32s(2, 4)], DType::F32).unwrap()];
    assert_shape(b.linear(2, &small, &weights, &mut buffer(b, 2, 6)));
    assert_shape(b.linear(3, &small, &weights, &mut buffer(b, 3, 5)));
    assert_shape(b.linear(2, &buffer(b, 2, 6), &weights, &mut buffer(b, 2, 5)));
    assert_shape(b.linear(2, &small, &weights, &mut b.buffer(DType::Bf16, 2, 5).unwrap()));
    let tree = Tree { units: 4 };
    let one = &weights[..1];
    let partial = |b: &B, units, cols| [Partial { units, sum: buffer(b, 2, cols) }];
    assert_shape(b.linear_partials(2, &small, one, 1, tree, &mut partial(b, 0..1, 3)));
    assert_shape(b.linear_partials(2, &small, one, 1, tree, &mut partial(b, 1..2, 4)));
    assert_shape(b.linear_partials(2, &small, one, 4, tree, &mut partial(b, 4..5, 3)));
    assert_shape(b.linear_partials(2, &small, one, 1, tree, &mut []));
    assert_shape(b.linear_partials(2, &buffer(b, 2, 8), &weights, 0, tree, &mut partial(b, 0..2, 3)));

    let batch = |slices: &[Slice]| Batch { slices: slices.to_vec() };
    let good = step(b, batch(&[slice(0, 2, &[0])]));
    assert_shape(b.rope_table(&good, &[1.0; 3], &mut buffer(b, 2, 4)));
    assert_shape(b.rope_table(&good, &[1.0; 2], &mut buffer(b, 1, 4)));

    let mut kv = b.kv_cache(kv_shape(2, 4), 3).unwrap();
    let (qkv, rope) = (buffer(b, 200, 16), buffer(b, 200, 4));
    let mut q = buffer(b, 200, 8);
    let bad = [
        batch(&[slice(0, 0, &[0])]),
        batch(&[slice(0, 65, &[0])]),
        batch(&[slice(usize::MAX, 2, &[0])]),
        batch(&[slice(0, 2, &[3])]),
        batch(&[slice(0, 201, &[0, 1, 2, 0])]),
    ];
    for batch in bad {
        let batch = &Step::new(vec![Token::Id(0); batch.rows()], batch, Vec::new());
        assert_shape(b.rope_write_kv(batch, &qkv, &rope, 0, &mut kv, &mut q));
        assert_shape(b.attend(batch, &q, 0, &kv, 1.0, &mut buffer(b, 200, 8)));
    }
    // Two slices must not write one block, but may read it.
    let shared = Step::new(vec![Token::Id(0); 2], batch(&[slice(0, 1, &[1]), slice(0, 1, &[1])]), Vec::new());
    assert_shape(b.rope_write_kv(&shared, &qkv, &rope, 0, &mut kv, &mut q));
    b.attend(&shared, &q, 0, &kv, 1.0, &mut buffer(b, 200, 8)).unwrap();
    assert_shape(b.rope_write_kv(&good, &qkv, &rope, 2, &mut kv, &mut q));
    assert_shape(b.rope_write_kv(&good, &buffer(b, 2, 8), &rope, 0, &mut kv, &mut q));
    assert_shape(b.rope_write_kv(&good, &buffer(b, 2, 17), &rope, 0, &mut kv, &mut q));
    assert_shape(b.rope_write_kv(&good, &qkv, &rope, 0, &mut kv, &mut buffer(b, 2, 4)));
    assert_shape(b.attend(&good, &q, 2, &kv, 1.0, &mut buffer(b, 2, 8)));
    assert_shape(b.attend(&good, &q, 0, &kv, 1.0, &mut buffer(b, 1, 8)));
    assert_shape(b.attend(&good, &q, 0, &kv, 1.0, &mut b.buffer(DType::Bf16, 2, 8).unwrap()));
    assert_shape(b.attend(&good, &buffer(b, 2, 3), 0, &kv, 1.0, &mut buffer(b, 2, 3)));

    assert_shape(b.silu_mul(2, &small, &[2, 1], &mut buffer(b, 2, 3)));
    assert_shape(b.silu_mul(2, &small, &[1, 1], &mut buffer(b, 2, 3)));
    let sampled = |b: &B, rows: &[usize]| {
        sampled_step(b, 2, &rows.iter().map(|&r| (r, Draw::GREEDY)).collect::<Vec<_>>())
    };
    assert_shape(b.gather_sampled(&sampled(b, &[2]), &small, &mut buffer(b, 2, 4)));
    assert_shape(b.gather_sampled(&sampled(b, &[0, 0, 0]), &small, &mut buffer(b, 2, 4)));
    assert_shape(b.gather_sampled(&sampled(b, &[0]), &small, &mut b.buffer(DType::Bf16, 2, 4).unwrap()));
    let mut chosen = buffer(b, 1, 2);
    assert_shape(b.sample(&sampled(b, &[0, 1]), &buffer(b, 1, 4), &mut buffer(b, 2, 2)));
    assert_shape(b.sample(&sampled(b, &[0]), &buffer(b, 1, 0), &mut chosen));
    assert_shape(b.sample(&sampled(b, &[0, 1]), &buffer(b, 2, 4), &mut chosen));
    assert_shape(b.sample(&sampled(b, &[0]), &buffer(b, 1, 4), &mut buffer(b, 1, 3)));
    assert_shape(b.keep(&sampled(b, &[0, 1]), &chosen));
    assert_shape(b.choices());
    let mut far = sampled(b, &[0]);
    far.sampled[0].slot = Some(MAX_SLOTS as u32);
    assert_shape(b.sample(&far, &buffer(b, 1, 4), &mut chosen));
    assert_shape(b.keep(&far, &chosen));
    far.tokens[1] = Token::LastSampled(MAX_SLOTS as u32);
    assert_shape(b.embed(&far, &table, &mut buffer(b, 2, 4)));
    let hollow = Step { rows: 1, ..sampled(b, &[0]) };
    assert_shape(b.embed(&hollow, &table, &mut buffer(b, 2, 4)));
}

#[test]
fn every_backend_rejects_bad_sizes() {
    rejects_bad_sizes(&mut Oracle::default());
    cpus().iter_mut().for_each(rejects_bad_sizes);
}

fn accepts_nothing<B: Device>(b: &mut B) {
    let empty = Step::new(Vec::new(), Batch::default(), Vec::new());
    let mut f32s = b.buffer(DType::F32, 0, 8).unwrap();
    let other = b.buffer(DType::F32, 0, 8).unwrap();
    let mut kv = b.kv_cache(kv_shape(1, 4), 0).unwrap();
    b.linear(0, &other, &[], &mut b.buffer(DType::F32, 0, 0).unwrap()).unwrap();
    b.rope_table(&empty, &[1.0; 4], &mut f32s).unwrap();
    let qkv = b.buffer(DType::F32, 0, 16).unwrap();
    b.rope_write_kv(&empty, &qkv, &b.buffer(DType::F32, 0, 4).unwrap(), 0, &mut kv, &mut f32s).unwrap();
    b.attend(&empty, &other, 0, &kv, 1.0, &mut f32s).unwrap();
    b.gather_sampled(&empty, &other, &mut f32s).unwrap();
    b.silu_mul(0, &other, &[4], &mut b.buffer(DType::F32, 0, 4).unwrap()).unwrap();
}

#[test]
fn a_step_without_rows_does_nothing() {
    accepts_nothing(&mut Oracle::default());
    cpus().iter_mut().for_each(accepts_nothing);
}

#[test]
fn too_much_memory_is_an_error() {
    let mut cpu = Cpu::new(1).unwrap();
    let buffer = cpu.buffer(DType::F32, 1 << 40, 1 << 10);
    assert!(matches!(buffer, Err(Error::OutOfMemory { .. })));
    let kv = cpu.kv_cache(KvShape { units: 1 << 10, ..kv_shape(1 << 20, 128) }, 1 << 20);
    assert!(matches!(kv, Err(Error::OutOfMemory { .. })));
}

#[test]
fn blocks_of_a_weight_are_stacked() {
    let values: Vec<f32> = (0..70 * 6).map(|i| i as f32).collect();
    let data = common::bytes(&values, SourceType::F32);
    for cpu in &mut cpus() {
        let row = 6 * 4;
        let blocks = [
            block(&data[..33 * row], SourceType::F32, 33, 6),
            block(&[], SourceType::F32, 0, 6),
            block(&data[33 * row..], SourceType::F32, 37, 6),
        ];
        let matrix = cpu.matrix(&blocks, DType::F32).unwrap();
        assert_eq!(cpu.matrix_bytes(&matrix), 96 * 6 * 4);
        let mut x = cpu.buffer(DType::F32, 1, 6).unwrap();
        x.as_f32_mut().unwrap()[4] = 1.0;
        let mut out = cpu.buffer(DType::F32, 1, 70).unwrap();
        cpu.linear(1, &x, &[matrix], &mut out).unwrap();
        let want: Vec<f32> = (0..70).map(|n| (n * 6 + 4) as f32).collect();
        assert_eq!(cpu.read_row(&out, 0).unwrap(), want);
    }
}

#[test]
fn paths_have_names() {
    assert!(Path::available().contains(&Path::detect()));
    assert_eq!(Path::available().last(), Some(&Path::Portable));
    for cpu in cpus() {
        assert!(Path::available().iter().any(|path| path.name() == cpu.path()));
        assert_eq!(cpu.threads(), 2);
    }
}

#[test]
fn a_backend_moves_to_the_thread_that_drives_it() {
    fn assert_send<T: Send>() {}
    fn assert_shared<T: Send + Sync>() {}
    assert_send::<Cpu>();
    assert_shared::<<Cpu as Backend>::Buffer>();
    assert_shared::<<Cpu as Backend>::Matrix>();
    assert_shared::<<Cpu as Backend>::KvCache>();
}
