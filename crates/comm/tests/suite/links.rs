//! The suite that every kind of stage link must pass, and what comes over a network.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use comm::{AbortHandle, Alone, Error, HostLink, StageLink, local_pipeline};

use crate::groups::{Host, each_rank};
use crate::pipelines::tcp_pipeline;

/// More than sockets hold.
const LARGE: usize = 4 << 20;

/// Links by stage and rank.
trait Kind {
    fn pipeline(widths: &[usize]) -> Vec<Vec<HostLink>>;
}

struct Local;

impl Kind for Local {
    fn pipeline(widths: &[usize]) -> Vec<Vec<HostLink>> {
        local_pipeline(widths).unwrap()
    }
}

struct Tcp;

impl Kind for Tcp {
    fn pipeline(widths: &[usize]) -> Vec<Vec<HostLink>> {
        let links = tcp_pipeline(widths).into_iter().map(|(_, neighbours)| neighbours.by_host().unwrap());
        by_stage(widths, links.collect())
    }
}

fn by_stage(widths: &[usize], mut links: Vec<HostLink>) -> Vec<Vec<HostLink>> {
    widths.iter().map(|&width| links.drain(..width).collect()).collect()
}

/// Runs `body` for every rank of a pipeline, on a thread of its own.
fn each_link<K: Kind, R: Send>(widths: &[usize], body: impl Fn(usize, HostLink) -> R + Sync) -> Vec<R> {
    each_rank(K::pipeline(widths).into_iter().flatten().collect(), body)
}

/// One rank each of two stages.
fn pair<K: Kind>() -> [HostLink; 2] {
    let links: Vec<HostLink> = K::pipeline(&[1, 1]).into_iter().flatten().collect();
    links.try_into().unwrap()
}

/// Numbers of all bits, of which each stage adds one.
fn rows(message: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| (message * 1000 + index) as f32).collect()
}

fn passes_on<K: Kind>(widths: &[usize]) {
    let lengths = [1, 0, 7, 20_000, 3];
    each_link::<K, _>(widths, |_, mut link| {
        let (stage, stages) = (link.stage(), link.stages());
        assert_eq!(stages, widths.len());
        for (message, len) in lengths.into_iter().enumerate() {
            let mut x = rows(message, len);
            if stage > 0 {
                let mut received = vec![f32::NAN; len];
                link.receive_rows(&mut received).unwrap();
                x.iter_mut().for_each(|value| *value += stage as f32 - 1.0);
                assert_eq!(received, x, "message {message} at stage {stage}");
                x.iter_mut().for_each(|value| *value += 1.0);
            }
            assert!(link.sends() || widths.get(stage + 1).is_none_or(|next| *next < widths[stage]));
            link.send_rows(x).unwrap();
        }
    });
}

fn exchange_at_any_widths<K: Kind>() {
    for widths in [&[1, 1][..], &[1, 3], &[3, 2], &[2, 5], &[4, 1, 3], &[1], &[1, 2, 2, 1]] {
        passes_on::<K>(widths);
    }
}

/// All bits travel, those of NaN too.
fn bits_are_kept<K: Kind>() {
    let [mut first, mut second] = pair::<K>();
    let bits = [0x7fc0_1234, 0xffff_ffff, 0x8000_0000, 1, 0x7f80_0000];
    first.send_rows(bits.map(f32::from_bits).to_vec()).unwrap();
    let mut received = [0.0; 5];
    second.receive_rows(&mut received).unwrap();
    assert_eq!(received.map(f32::to_bits), bits);
}

/// As many messages as there are stages may wait, however long they are, with nobody who receives.
fn a_slow_receiver_does_not_hold_up_the_sender<K: Kind>() {
    let [mut first, mut second] = pair::<K>();
    for message in 0..2 {
        first.send_rows(rows(message, LARGE)).unwrap();
    }
    let mut received = vec![0.0; LARGE];
    for message in 0..2 {
        second.receive_rows(&mut received).unwrap();
        assert!(received == rows(message, LARGE));
    }
}

/// Whether `wait` tells that it waits for `member`, and the flag frees it soon; it must not end by itself.
fn abort_frees(abort: AbortHandle, member: usize, wait: impl FnOnce() -> Error + Send) {
    let waits = Barrier::new(2);
    thread::scope(|scope| {
        let freed = scope.spawn(|| {
            waits.wait();
            let error = wait();
            assert!(matches!(error, Error::Aborted), "{error}");
            Instant::now()
        });
        waits.wait();
        while abort.waits_for() != Some(member) {
            thread::yield_now();
        }
        let told = Instant::now();
        abort.abort();
        assert!(freed.join().unwrap().saturating_duration_since(told) < Duration::from_millis(500));
    });
}

fn abort_frees_a_blocked_receiver<K: Kind>() {
    let [_first, mut second] = pair::<K>();
    abort_frees(second.abort_handle(), 0, || {
        let error = second.receive_rows(&mut [0.0]).unwrap_err();
        assert!(matches!(second.receive_rows(&mut [0.0]), Err(Error::Ended)), "a lost pipeline stays lost");
        error
    });
}

fn abort_frees_a_blocked_sender<K: Kind>() {
    let [mut first, _second] = pair::<K>();
    abort_frees(first.abort_handle(), 1, || {
        let error = (0..10).find_map(|message| first.send_rows(rows(message, LARGE)).err()).unwrap();
        assert!(matches!(first.send_rows(Vec::new()), Err(Error::Ended)), "a lost pipeline stays lost");
        error
    });
}

#[track_caller]
fn names(error: &Error, stage: usize, rank: usize) {
    let Error::Stage { stage: found, source } = error else { panic!("{error}") };
    assert!(*found == stage && matches!(**source, Error::Lost { rank: r, .. } if r == rank), "{error}");
}

fn a_dead_sender_is_named<K: Kind>() {
    each_link::<K, _>(&[2, 3], |index, mut link| match index {
        1 => {}
        3 => names(&link.receive_rows(&mut [0.0]).unwrap_err(), 0, 1),
        _ => {}
    });
}

/// What a rank sent before it ended still counts.
fn a_dead_senders_messages_still_count<K: Kind>() {
    let [mut first, mut second] = pair::<K>();
    first.send_rows(rows(1, 100_000)).unwrap();
    drop(first);
    let mut received = vec![0.0; 100_000];
    second.receive_rows(&mut received).unwrap();
    assert!(received == rows(1, 100_000));
    names(&second.receive_rows(&mut received).unwrap_err(), 0, 0);
}

fn a_dead_receiver_is_named<K: Kind>() {
    let [mut first, second] = pair::<K>();
    drop(second);
    // The first ones may still find room on the way.
    let error = (0..10).find_map(|message| first.send_rows(rows(message, LARGE)).err()).unwrap();
    names(&error, 1, 0);
}

#[track_caller]
fn is_refused(error: &Error) {
    let Error::Stage { stage: 0, source } = error else { panic!("{error}") };
    assert!(matches!(**source, Error::Protocol { rank: 0, .. }), "{error}");
}

fn other_lengths_are_refused<K: Kind>() {
    for len in [0, 5, 7, LARGE] {
        let [mut first, mut second] = pair::<K>();
        first.send_rows(rows(0, len)).unwrap();
        is_refused(&second.receive_rows(&mut [0.0; 6]).unwrap_err());
    }
}

fn the_first_stage_receives_nothing<K: Kind>() {
    let [mut first, mut second] = pair::<K>();
    assert!(matches!(first.receive_rows(&mut []), Err(Error::Shape { .. })));
    assert!(!second.sends());
    second.send_rows(vec![1.0]).unwrap();
}

/// Buffers that the host sees are sent as they are, and no more of them than was said.
#[test]
fn a_part_of_a_buffer_travels() {
    let [mut first, mut second] = pair::<Local>();
    let (mut long, short) = (Host(vec![9.0; 4]), Host(vec![1.0, 2.0]));
    first.send(2, &short).unwrap();
    second.receive(2, &mut long).unwrap();
    assert_eq!(long.0, [1.0, 2.0, 9.0, 9.0]);
    assert!(matches!(first.send(3, &short), Err(Error::Shape { .. })));
    assert!(matches!(second.receive(5, &mut long), Err(Error::Shape { .. })));
}

#[test]
fn the_only_stage_has_nobody_around() {
    let mut alone: Box<dyn StageLink<Host>> = Box::new(Alone);
    assert_eq!((alone.stage(), alone.stages(), alone.sends()), (0, 1, false));
    alone.send(1, &Host(vec![1.0])).unwrap();
    assert!(matches!(alone.receive(1, &mut Host(vec![0.0])), Err(Error::Shape { .. })));
}

macro_rules! suite {
    ($name:ident, $kind:ty, [$($test:ident),*]) => {
        mod $name {
            use super::*;

            $(#[test]
            fn $test() {
                super::$test::<$kind>();
            })*
        }
    };
    ($name:ident, $kind:ty) => {
        suite!($name, $kind, [
            exchange_at_any_widths, bits_are_kept, a_slow_receiver_does_not_hold_up_the_sender,
            abort_frees_a_blocked_receiver, abort_frees_a_blocked_sender, a_dead_sender_is_named,
            a_dead_senders_messages_still_count, a_dead_receiver_is_named, other_lengths_are_refused,
            the_first_stage_receives_nothing
        ]);
    };
}

suite!(local, Local);
suite!(tcp, Tcp);
