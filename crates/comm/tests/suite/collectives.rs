//! The suite that every transport must pass: results, bit for bit, and the ways in which a group ends.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use comm::{Collective, Error, LocalTransport, MeshCollective, TcpTransport, Transport};
use kernels::{Partial, Tree};
use proptest::prelude::*;

use crate::groups::{Host, Kind, each_rank, one_unit_each};

/// The reference: one thread that adds the units' values along the tree.
fn fold(node: Range<usize>, units: &[Vec<f32>]) -> Vec<f32> {
    if node.len() == 1 {
        return units[node.start].clone();
    }
    let middle = Tree::split(&node);
    let (left, right) = (fold(node.start..middle, units), fold(middle..node.end, units));
    left.into_iter().zip(right).map(|(l, r)| l + r).collect()
}

/// Values whose sum depends on the order: all magnitudes and both signs.
fn value(seed: u64, unit: usize, index: usize) -> f32 {
    let mut x = seed ^ (unit as u64) << 40 ^ index as u64;
    for _ in 0..2 {
        x = (x ^ x >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    (x as i32 as f32) * 2f32.powi((x >> 40) as i32 % 40 - 40)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Reduces twice (so that scratch is used again), on ranks that hold `ranges`.
fn reduces<T: Kind>(ranges: &[Range<usize>], len: usize, seed: u64) {
    let count = ranges.last().unwrap().end;
    let tree = Tree { units: count };
    let units: Vec<Vec<f32>> =
        (0..count).map(|unit| (0..len).map(|index| value(seed, unit, index)).collect()).collect();
    let expected = bits(&fold(0..count, &units));
    let sums = each_rank(T::group(ranges.len()), |rank, transport| {
        let mut mesh = MeshCollective::new(transport, ranges.to_vec()).unwrap();
        let partials: Vec<_> = tree
            .subtrees(&ranges[rank])
            .into_iter()
            // Buffers may be longer than what counts.
            .map(|node| Partial {
                sum: Host([fold(node.clone(), &units), vec![f32::NAN; 3]].concat()),
                units: node,
            })
            .collect();
        let mut out = Host(vec![f32::NAN; len + 1]);
        mesh.tree_reduce(tree, len / 2, &partials, &mut out).unwrap();
        assert_eq!(bits(&out.0[..len / 2]), expected[..len / 2]);
        mesh.tree_reduce(tree, len, &partials, &mut out).unwrap();
        out.0
    });
    for sum in sums {
        assert_eq!(bits(&sum[..len]), expected);
        assert!(sum[len].is_nan(), "wrote past the elements that count");
    }
}

/// Units of every rank, unevenly cut; lengths on both sides of the one-shot limit.
fn cuts() -> impl Strategy<Value = (Vec<Range<usize>>, usize, u64)> {
    (1usize..12, any::<u64>(), prop_oneof![0usize..40, 8_000usize..8_400, 16_300usize..30_000])
        .prop_flat_map(|(units, seed, len)| {
            (
                proptest::sample::subsequence((1..units).collect::<Vec<_>>(), 0..units),
                Just((units, len, seed)),
            )
        })
        .prop_map(|(mut ends, (units, len, seed))| {
            ends.push(units);
            let starts = std::iter::once(0).chain(ends.clone());
            (starts.zip(ends.clone()).map(|(start, end)| start..end).collect(), len, seed)
        })
}

fn all_widths<T: Kind>() {
    for width in 1..=8 {
        let ranges: Vec<_> = (0..width).map(|rank| 8 * rank / width..8 * (rank + 1) / width).collect();
        for len in [1, 4096, 20_001] {
            reduces::<T>(&ranges, len, 7);
        }
    }
}

/// Far more than sockets hold, in all directions at once.
fn large_messages<T: Kind>() {
    reduces::<T>(&[0..1, 1..2, 2..3], 3 << 20, 1);
}

fn gathers<T: Kind>() {
    for (counts, rows) in
        [(vec![4], 2), (vec![3, 0, 5], 4), (vec![2, 2], 0), (vec![1000, 1001, 999, 1000], 9)]
    {
        let cols: usize = counts.iter().sum();
        for root in 0..counts.len() {
            let outs = each_rank(T::group(counts.len()), |rank, transport| {
                let mut mesh = one_unit_each(transport).unwrap();
                let first: usize = counts[..rank].iter().sum();
                let entry = |i: usize| (i / counts[rank] * cols + first + i % counts[rank]) as f32;
                let x = Host((0..rows * counts[rank]).map(entry).collect());
                let mut out = Host(vec![-1.0; rows * cols]);
                mesh.gather(root, rows, &x, &counts, &mut out).unwrap();
                out.0
            });
            for (rank, out) in outs.into_iter().enumerate() {
                let expected = |i| if rank == root { i as f32 } else { -1.0 };
                assert_eq!(out, (0..rows * cols).map(expected).collect::<Vec<_>>());
            }
        }
    }
}

/// Sums and gathers in turn stay in step, though some ranks run ahead.
fn mixed_calls<T: Kind>() {
    let size = 3;
    each_rank(T::group(size), |rank, transport| {
        let mut mesh = one_unit_each(transport).unwrap();
        for round in 0..200 {
            let partial = Partial { units: rank..rank + 1, sum: Host(vec![round as f32; 5]) };
            let mut out = Host(vec![0.0; 15]);
            mesh.tree_reduce(Tree { units: size }, 5, &[partial], &mut out).unwrap();
            assert_eq!(out.0[..5], [3.0 * round as f32; 5]);
            mesh.gather(round % size, 1, &Host(vec![rank as f32]), &[1; 3], &mut out).unwrap();
            if round % size == rank {
                assert_eq!(out.0[..3], [0.0, 1.0, 2.0]);
            }
        }
    });
}

fn reduce_one<T: Transport>(mesh: &mut MeshCollective<T>) -> comm::Result<()> {
    let (rank, size) = (Collective::<Host>::rank(mesh), Collective::<Host>::size(mesh));
    let partial = Partial { units: rank..rank + 1, sum: Host(vec![1.0; 8]) };
    mesh.tree_reduce(Tree { units: size }, 8, &[partial], &mut Host(vec![0.0; 8]))
}

/// Rank 2 never calls; the others wait for it until they are told to stop.
fn abort_frees_a_blocked_rank<T: Kind>() {
    let mut ends = T::group(3);
    let _silent = ends.pop();
    let aborts: Vec<_> = ends.iter().map(T::abort_handle).collect();
    let told = thread::spawn(move || {
        // Whether they wait by now or not, the flag frees them.
        thread::sleep(Duration::from_millis(30));
        aborts.iter().for_each(comm::AbortHandle::abort);
        Instant::now()
    });
    let freed = each_rank(ends, |_, transport| {
        let mut mesh = one_unit_each(transport).unwrap();
        assert!(matches!(reduce_one(&mut mesh), Err(Error::Aborted)));
        let freed = Instant::now();
        assert!(matches!(reduce_one(&mut mesh), Err(Error::Ended)), "a lost group stays lost");
        freed
    });
    let told = told.join().unwrap();
    assert!(
        freed.into_iter().all(|freed| freed.saturating_duration_since(told) < Duration::from_millis(500))
    );
}

/// A rank whose thread or process ends is noticed by those that wait for it.
fn a_lost_peer_is_named<T: Kind>() {
    let mut ends = T::group(2);
    drop(ends.pop());
    let mut mesh = one_unit_each(ends.remove(0)).unwrap();
    let error = reduce_one(&mut mesh).unwrap_err();
    assert!(matches!(error, Error::Lost { rank: 1, .. }), "{error}");
}

/// What a rank sent before it ended still counts.
fn a_peer_may_leave_after_its_last_call<T: Kind>() {
    each_rank(T::group(3), |_, transport| reduce_one(&mut one_unit_each(transport).unwrap()).unwrap());
}

/// Ranks that do not make the same call find out.
fn different_calls_are_noticed<T: Kind>() {
    let results = each_rank(T::group(2), |rank, transport| {
        let mut mesh = one_unit_each(transport).unwrap();
        let partial = Partial { units: rank..rank + 1, sum: Host(vec![1.0; 8]) };
        mesh.tree_reduce(Tree { units: 2 }, 4 + rank, &[partial], &mut Host(vec![0.0; 8]))
    });
    assert!(results.iter().any(|result| matches!(result, Err(Error::Protocol { .. }))), "{results:?}");
    assert!(results.iter().all(Result::is_err));
}

fn false_arguments_are_errors<T: Kind>() {
    let new = |ranges: &[Range<usize>]| MeshCollective::new(T::group(1).remove(0), ranges.to_vec());
    for ranges in [&[][..], &[0..0], &[1..2], &[0..1, 1..2]] {
        assert!(matches!(new(ranges), Err(Error::Shape { .. })), "{ranges:?}");
    }
    let sum = |units, len| {
        let partials = [Partial { units: 0..2, sum: Host(vec![1.0; 8]) }];
        new(&[0..2]).unwrap().tree_reduce(Tree { units }, len, &partials, &mut Host(vec![0.0; 8]))
    };
    assert!(sum(2, 8).is_ok());
    assert!(matches!(sum(2, 9), Err(Error::Shape { .. })));
    assert!(matches!(sum(3, 8), Err(Error::Shape { .. })));
    assert!(matches!(sum(1, 8), Err(Error::Shape { .. })));
}

macro_rules! suite {
    ($kind:ident, $transport:ty, $cases:literal, [$($test:ident),*]) => {
        mod $kind {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig::with_cases($cases))]
                #[test]
                fn any_cut_gives_the_same_bits((ranges, len, seed) in cuts()) {
                    reduces::<$transport>(&ranges, len, seed);
                }
            }

            $(#[test]
            fn $test() {
                super::$test::<$transport>();
            })*
        }
    };
    ($kind:ident, $transport:ty, $cases:literal) => {
        suite!($kind, $transport, $cases, [
            all_widths, large_messages, gathers, mixed_calls, abort_frees_a_blocked_rank, a_lost_peer_is_named,
            a_peer_may_leave_after_its_last_call, different_calls_are_noticed, false_arguments_are_errors
        ]);
    };
}

suite!(local, LocalTransport, 64);
suite!(tcp, TcpTransport, 24);
