//! Every op of every CPU path against the oracle.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::ops::{embedded, gated, linear, norms, partials, turned};
use common::{Device, Random, Sequences, assert_close, cpus, run, sampled_step};
use kernels::{Backend, DType, Draw, HostBuffer, Oracle, SourceType};

const TYPES: [(DType, DType, SourceType); 6] = [
    (DType::F32, DType::F32, SourceType::F32),
    (DType::F32, DType::F32, SourceType::F16),
    (DType::F32, DType::F32, SourceType::Bf16),
    (DType::F32, DType::Bf16, SourceType::F32),
    (DType::Bf16, DType::Bf16, SourceType::Bf16),
    (DType::Bf16, DType::F32, SourceType::F32),
];

#[test]
fn linear_of_ragged_shapes() {
    for cpu in &mut cpus() {
        for types in TYPES {
            for k in [2, 14, 16, 30, 34, 66, 512, 514, 1030] {
                for rows in [1, 2, 3, 5, 12, 13, 29] {
                    let n = [1, 15, 16, 17, 33, 64];
                    let what = format!("{} {types:?} {rows} × {k}", cpu.path());
                    let want = linear(&mut Oracle::default(), types, rows, k, &n);
                    assert_close(&linear(cpu, types, rows, k, &n), &want, 1e-4, &what);
                }
            }
        }
    }
}

#[test]
fn linear_of_many_rows() {
    for cpu in &mut cpus() {
        for types in [TYPES[0], TYPES[4]] {
            let want = linear(&mut Oracle::default(), types, 700, 1100, &[200]);
            assert_close(&linear(cpu, types, 700, 1100, &[200]), &want, 3e-4, cpu.path());
        }
    }
}

#[test]
fn linear_partials_of_uneven_units() {
    for cpu in &mut cpus() {
        for types in TYPES {
            for (units, held) in [(1, 0..1), (4, 0..4), (8, 1..7), (7, 2..7), (5, 4..5)] {
                for rows in [1, 7, 40] {
                    let what = format!("{} {types:?} units {held:?} of {units}, {rows} rows", cpu.path());
                    let want = partials(&mut Oracle::default(), types, 2, rows, units, held.clone());
                    assert_close(&partials(cpu, types, 2, rows, units, held.clone()), &want, 2e-4, &what);
                }
            }
        }
    }
}

#[test]
fn embed_gives_rows_or_zeros() {
    for cpu in &mut cpus() {
        for dtype in [DType::F32, DType::Bf16] {
            for source in [SourceType::F32, SourceType::F16, SourceType::Bf16] {
                assert_eq!(embedded(cpu, dtype, source), embedded(&mut Oracle::default(), dtype, source));
            }
        }
    }
}

#[test]
fn norms_of_any_width() {
    for cpu in &mut cpus() {
        for (compute, tolerance) in [(DType::F32, 1e-5), (DType::Bf16, 8e-3)] {
            for cols in [1, 7, 16, 33, 64, 100, 2048] {
                for rows in [1, 3, 40] {
                    let want = norms(&mut Oracle::default(), compute, rows, cols);
                    assert_close(&norms(cpu, compute, rows, cols), &want, tolerance, cpu.path());
                }
            }
        }
    }
}

#[test]
fn silu_mul_of_odd_widths() {
    for cpu in &mut cpus() {
        for (compute, tolerance) in [(DType::F32, 1e-5), (DType::Bf16, 8e-3)] {
            for widths in [&[1][..], &[5, 3, 17], &[129, 128], &[64, 64, 64, 65]] {
                let want = gated(&mut Oracle::default(), compute, 9, widths);
                assert_close(&gated(cpu, compute, 9, widths), &want, tolerance, cpu.path());
            }
        }
    }
}

#[test]
fn silu_mul_at_the_ends_of_the_range() {
    for cpu in &mut cpus() {
        let gates = [-1e30, -200.0, -90.0, -0.0, 90.0, 200.0, 1e30];
        let row: Vec<f32> = gates.into_iter().chain([1.0; 7]).collect();
        let gate_up = cpu.filled(DType::F32, &[row]);
        let mut out = cpu.buffer(DType::F32, 1, 7).unwrap();
        cpu.silu_mul(1, &gate_up, &[7], &mut out).unwrap();
        let want = [0.0, 0.0, 0.0, 0.0, 90.0, 200.0, 1e30];
        assert_close(&[out.row(0)], &[want.to_vec()], 1e-6, cpu.path());
    }
}

#[test]
fn rope_far_out() {
    for cpu in &mut cpus() {
        assert_close(&turned(cpu), &turned(&mut Oracle::default()), 1e-7, cpu.path());
    }
}

#[test]
fn gathered_rows_are_copies() {
    for cpu in &mut cpus() {
        for dtype in [DType::F32, DType::Bf16] {
            let x = cpu.filled(dtype, &Random::new(1).rows(5, 19));
            let mut out = cpu.buffer(dtype, 4, 19).unwrap();
            let step = sampled_step(cpu, 5, &[4, 0, 4, 2].map(|row| (row, Draw::GREEDY)));
            run(cpu, &step, |cpu| cpu.gather_sampled(&step, &x, &mut out));
            assert_eq!(<kernels::Cpu as Device>::rows(&out, 4), [x.row(4), x.row(0), x.row(4), x.row(2)]);
        }
    }
}

/// Outputs and caches in f32, both in bf16, and mixed.
const ATTENTION: [(DType, DType, f32); 4] = [
    (DType::F32, DType::F32, 3e-5),
    (DType::Bf16, DType::Bf16, 1.5e-2),
    (DType::F32, DType::Bf16, 1e-4),
    (DType::Bf16, DType::F32, 8e-3),
];

fn assert_attention(sequences: &Sequences, steps: &[Vec<(usize, usize)>], tolerance: f32) {
    let want = sequences.run(&mut Oracle::default(), steps);
    for cpu in &mut cpus() {
        let got = sequences.run(cpu, steps);
        for (sequence, (got, want)) in got.iter().zip(&want).enumerate() {
            let what = format!("{} {sequences:?} sequence {sequence}", cpu.path());
            assert_close(got, want, tolerance, &what);
        }
    }
}

#[test]
fn attention_of_all_head_shapes() {
    for (compute, kv, tolerance) in ATTENTION {
        for head_dim in [16, 24, 32, 64, 80, 128] {
            for group in [1, 2, 4, 7, 8] {
                let sequences = Sequences {
                    units: 2,
                    group,
                    head_dim,
                    compute,
                    kv,
                    seed: (head_dim + group) as u64,
                    lengths: vec![70, 33, 130],
                    recycled: true,
                };
                // Prefill in chunks with decoding beside it, then decoding alone.
                let steps = [
                    vec![(0, 40), (1, 32)],
                    vec![(1, 1), (0, 25), (2, 127)],
                    vec![(0, 1), (2, 1)],
                    vec![(2, 2), (0, 4)],
                ];
                assert_attention(&sequences, &steps, tolerance);
            }
        }
    }
}

#[test]
fn attention_over_several_spans() {
    for (compute, kv, tolerance) in ATTENTION {
        let sequences = Sequences {
            units: 1,
            group: 3,
            head_dim: 32,
            compute,
            kv,
            seed: 3,
            lengths: vec![1300, 515],
            recycled: true,
        };
        let steps = [vec![(0, 500), (1, 510)], vec![(1, 4), (0, 798)], vec![(0, 1), (1, 1)], vec![(0, 1)]];
        assert_attention(&sequences, &steps, tolerance);
    }
}

#[test]
fn the_oracle_shares_its_memory_too() {
    let mut buffer = Oracle::default().buffer(DType::F32, 1, 2).unwrap();
    buffer.as_f32_mut().unwrap()[1] = 3.0;
    assert_eq!(Oracle::default().read_row(&buffer, 0), Ok(vec![0.0, 3.0]));
    assert!(Oracle::default().buffer(DType::Bf16, 1, 2).unwrap().as_f32().is_none());
}
