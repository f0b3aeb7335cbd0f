//! The suite that every collective must pass: results, bit for bit, and the ways in which a group ends.

use std::ops::Range;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use comm::{Collective, Error, LocalTransport, MeshCollective, TcpTransport};
use kernels::{Partial, Tree};
use proptest::prelude::*;

use crate::groups::{Kind, each_rank, one_unit_each};

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
fn reduces<K: Kind>(ranges: &[Range<usize>], len: usize, seed: u64) {
    let count = ranges.last().unwrap().end;
    let tree = Tree { units: count };
    let units: Vec<Vec<f32>> =
        (0..count).map(|unit| (0..len).map(|index| value(seed, unit, index)).collect()).collect();
    let expected = bits(&fold(0..count, &units));
    let sums = each_rank(K::group(ranges.len()), |rank, end| {
        let (site, mut collective) = K::join(end, ranges).unwrap();
        let partials: Vec<_> = tree
            .subtrees(&ranges[rank])
            .into_iter()
            // Buffers may be longer than what counts.
            .map(|node| Partial {
                sum: K::buffer(&site, &[fold(node.clone(), &units), vec![f32::NAN; 3]].concat()),
                units: node,
            })
            .collect();
        let mut out = K::buffer(&site, &vec![f32::NAN; len + 1]);
        collective.tree_reduce(tree, len / 2, &partials, &mut out).unwrap();
        assert_eq!(bits(&K::values(&out)[..len / 2]), expected[..len / 2]);
        collective.tree_reduce(tree, len, &partials, &mut out).unwrap();
        let sum = K::values(&out);
        collective.check().unwrap();
        sum
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

fn all_widths<K: Kind>() {
    for width in 1..=8 {
        let ranges: Vec<_> = (0..width).map(|rank| 8 * rank / width..8 * (rank + 1) / width).collect();
        for len in [1, 4096, 20_001] {
            reduces::<K>(&ranges, len, 7);
        }
    }
}

/// Far more than sockets hold, in all directions at once.
fn large_messages<K: Kind>() {
    reduces::<K>(&[0..1, 1..2, 2..3], 3 << 20, 1);
}

fn gathers<K: Kind>() {
    for (counts, rows) in
        [(vec![4], 2), (vec![3, 0, 5], 4), (vec![2, 2], 0), (vec![1000, 1001, 999, 1000], 9)]
    {
        let cols: usize = counts.iter().sum();
        for root in 0..counts.len() {
            let outs = each_rank(K::group(counts.len()), |rank, end| {
                let (site, mut collective) = one_unit_each::<K>(end, counts.len()).unwrap();
                let first: usize = counts[..rank].iter().sum();
                let entry = |i: usize| (i / counts[rank] * cols + first + i % counts[rank]) as f32;
                let x: Vec<f32> = (0..rows * counts[rank]).map(entry).collect();
                let mut out = K::buffer(&site, &vec![-1.0; rows * cols]);
                collective.gather(root, rows, &K::buffer(&site, &x), &counts, &mut out).unwrap();
                K::values(&out)
            });
            for (rank, out) in outs.into_iter().enumerate() {
                let expected = |i| if rank == root { i as f32 } else { -1.0 };
                assert_eq!(out, (0..rows * cols).map(expected).collect::<Vec<_>>());
            }
        }
    }
}

/// From every rank, in place; what is behind the elements that count stays.
fn broadcasts<K: Kind>() {
    for len in [0, 1, 7, 1025, 20_000] {
        let size = 3;
        let sent = |root: usize, index: usize| match index {
            // Bits that are no ordinary numbers: small integers, and a NaN's payload.
            0 => 17,
            1 => 0xffff_fff0 + root as u32,
            _ => value(root as u64, root, index).to_bits(),
        };
        each_rank(K::group(size), |rank, end| {
            let (site, mut collective) = one_unit_each::<K>(end, size).unwrap();
            // Memory of a device is not freed while others that are on it wait for this rank.
            let mut kept = Vec::new();
            for root in 0..size {
                let own = |index| if rank == root { sent(root, index) } else { 7 };
                let own: Vec<f32> = (0..len + 2).map(own).map(f32::from_bits).collect();
                let mut x = K::buffer(&site, &own);
                collective.broadcast(root, len, &mut x).unwrap();
                let expected = (0..len).map(|index| sent(root, index)).chain(bits(&own[len..]));
                assert_eq!(bits(&K::values(&x)), expected.collect::<Vec<_>>(), "{len} from rank {root}");
                kept.push(x);
            }
            drop(collective);
        });
    }
}

/// Sums and gathers in turn stay in step, though some ranks run ahead.
fn mixed_calls<K: Kind>() {
    let size = 3;
    each_rank(K::group(size), |rank, end| {
        let (site, mut collective) = one_unit_each::<K>(end, size).unwrap();
        // Memory of a device is not freed while others that are on it wait for this rank.
        let mut kept = Vec::new();
        for round in 0..200 {
            let partial = Partial { units: rank..rank + 1, sum: K::buffer(&site, &[round as f32; 5]) };
            let (own, mut out) = (K::buffer(&site, &[rank as f32]), K::buffer(&site, &[0.0; 15]));
            let partials = [partial];
            collective.tree_reduce(Tree { units: size }, 5, &partials, &mut out).unwrap();
            assert_eq!(K::values(&out)[..5], [3.0 * round as f32; 5]);
            collective.gather(round % size, 1, &own, &[1; 3], &mut out).unwrap();
            if round % size == rank {
                assert_eq!(K::values(&out)[..3], [0.0, 1.0, 2.0]);
            }
            kept.push((partials, own, out));
        }
        drop(collective);
    });
}

fn reduce_one<K: Kind>(site: &K::Site, collective: &mut K::Collective) -> comm::Result<()> {
    let (rank, size) = (collective.rank(), collective.size());
    let partials = [Partial { units: rank..rank + 1, sum: K::buffer(site, &[1.0; 8]) }];
    let mut out = K::buffer(site, &[0.0; 8]);
    collective.tree_reduce(Tree { units: size }, 8, &partials, &mut out)?;
    K::settle(site);
    collective.check()
}

/// Rank 2 never calls; the others wait for it until they are told to stop.
fn abort_frees_a_blocked_rank<K: Kind>() {
    let ends = K::group(3);
    let aborts: Vec<_> = ends.iter().map(K::abort_handle).collect();
    let (all_joined, all_freed) = (Barrier::new(4), Barrier::new(3));
    thread::scope(|scope| {
        let told = scope.spawn(|| {
            all_joined.wait();
            // Whether they wait by now or not, the flag frees them.
            thread::sleep(Duration::from_millis(30));
            aborts.iter().for_each(comm::AbortHandle::abort);
            Instant::now()
        });
        let freed = each_rank(ends, |rank, end| {
            let (site, mut collective) = one_unit_each::<K>(end, 3).unwrap();
            all_joined.wait();
            let freed = (rank < 2).then(|| {
                assert!(matches!(reduce_one::<K>(&site, &mut collective), Err(Error::Aborted)));
                let freed = Instant::now();
                let again = reduce_one::<K>(&site, &mut collective);
                assert!(matches!(again, Err(Error::Ended)), "a lost group stays lost");
                freed
            });
            all_freed.wait();
            freed
        });
        let told = told.join().unwrap();
        let limit = Duration::from_millis(500);
        assert!(freed.into_iter().flatten().all(|freed| freed.saturating_duration_since(told) < limit));
    });
}

/// A rank whose thread or process ends is noticed by those that wait for it.
fn a_lost_peer_is_named<K: Kind>() {
    each_rank(K::group(2), |rank, end| {
        let (site, mut collective) = one_unit_each::<K>(end, 2).unwrap();
        if rank == 0 {
            let error = reduce_one::<K>(&site, &mut collective).unwrap_err();
            assert!(matches!(error, Error::Lost { rank: 1, .. }), "{error}");
        }
    });
}

/// What a rank sent before it ended still counts.
fn a_peer_may_leave_after_its_last_call<K: Kind>() {
    each_rank(K::group(3), |_, end| {
        let (site, mut collective) = one_unit_each::<K>(end, 3).unwrap();
        reduce_one::<K>(&site, &mut collective).unwrap();
    });
}

/// Ranks that do not make the same call find out.
fn different_calls_are_noticed<K: Kind>() {
    let results = each_rank(K::group(2), |rank, end| {
        let (site, mut collective) = one_unit_each::<K>(end, 2).unwrap();
        let partial = Partial { units: rank..rank + 1, sum: K::buffer(&site, &[1.0; 8]) };
        let mut out = K::buffer(&site, &[0.0; 8]);
        collective.tree_reduce(Tree { units: 2 }, 4 + rank, &[partial], &mut out)
    });
    assert!(results.iter().any(|result| matches!(result, Err(Error::Protocol { .. }))), "{results:?}");
    assert!(results.iter().all(Result::is_err));
}

fn false_arguments_are_errors<K: Kind>() {
    let join = |ranges: &[Range<usize>]| K::join(K::group(1).remove(0), ranges);
    for ranges in [&[][..], &[0..0], &[1..2], &[0..1, 1..2]] {
        assert!(join(ranges).is_err_and(|error| matches!(error, Error::Shape { .. })), "{ranges:?}");
    }
    let sum = |units, len| {
        let (site, mut collective) = join(&[0..2]).unwrap();
        let partials = [Partial { units: 0..2, sum: K::buffer(&site, &[1.0; 8]) }];
        collective.tree_reduce(Tree { units }, len, &partials, &mut K::buffer(&site, &[0.0; 8]))
    };
    let refused = |units, len| {
        let error = sum(units, len).unwrap_err();
        matches!(error, Error::Shape { .. } | Error::Device(kernels::Error::Shape { .. }))
    };
    assert!(sum(2, 8).is_ok());
    assert!(refused(2, 9));
    assert!(refused(3, 8));
    assert!(refused(1, 8));
    let (site, mut collective) = join(&[0..2]).unwrap();
    let error = collective.broadcast(1, 1, &mut K::buffer(&site, &[1.0])).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

macro_rules! suite {
    ($name:ident, $kind:ty, $cases:literal, [$($test:ident),*]) => {
        mod $name {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig::with_cases($cases))]
                #[test]
                fn any_cut_gives_the_same_bits((ranges, len, seed) in cuts()) {
                    if <$kind>::present() {
                        reduces::<$kind>(&ranges, len, seed);
                    }
                }
            }

            $(#[test]
            fn $test() {
                if <$kind>::present() {
                    super::$test::<$kind>();
                }
            })*
        }
    };
    ($name:ident, $kind:ty, $cases:literal) => {
        suite!($name, $kind, $cases, [
            all_widths, large_messages, gathers, broadcasts, mixed_calls, abort_frees_a_blocked_rank, a_lost_peer_is_named,
            a_peer_may_leave_after_its_last_call, different_calls_are_noticed, false_arguments_are_errors
        ]);
    };
}

suite!(local, MeshCollective<LocalTransport>, 64);
suite!(tcp, MeshCollective<TcpTransport>, 24);

#[cfg(feature = "cuda")]
mod gpu {
    use comm::cuda::{LocalGpu, StagedCollective};

    use super::*;
    use crate::gpu::{Auto, Nccl, Peer, Process, present, waits_on_callers};

    suite!(staged_local, StagedCollective<LocalTransport>, 8);
    suite!(staged_tcp, StagedCollective<TcpTransport>, 4);
    suite!(local_gpu, LocalGpu, 16);

    // Ranks that make different calls wait for each other, or find nothing wrong: the plans that make the calls are the same.
    macro_rules! process_suite {
        ($name:ident, $ask:ty, $cases:literal $(, $test:ident)*) => {
            suite!(
                $name,
                Process<$ask, TcpTransport>,
                $cases,
                [
                    all_widths,
                    large_messages,
                    gathers,
                    broadcasts,
                    mixed_calls,
                    a_peer_may_leave_after_its_last_call,
                    false_arguments_are_errors
                    $(, $test)*
                ]
            );
        };
    }
    process_suite!(peer, Peer, 12, abort_frees_a_blocked_rank, a_lost_peer_is_named);
    // NCCL may say first that a rank is gone, without its name: see `device`.
    process_suite!(nccl, Nccl, 8);
    process_suite!(peer_and_nccl, Auto, 4, abort_frees_a_blocked_rank, a_lost_peer_is_named);

    #[test]
    fn abort_frees_a_rank_blocked_in_nccl() {
        if present() && !waits_on_callers() {
            abort_frees_a_blocked_rank::<Process<Nccl, TcpTransport>>();
        }
    }
}
