//! Who is let into a pipeline over TCP, and what a network may do to it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use auth::Secret;
use comm::{AbortHandle, Error, GroupSpec, Listener, Neighbours, Result, TcpTransport, Transport};
use proptest::prelude::*;

use crate::groups::{LONG, each_rank, listener};

/// How long the accepting side waits for a peer that is not let in, before it says why.
const SHORT: Duration = Duration::from_millis(100);
/// What the responder of a handshake says, in bytes; frames follow.
const HANDSHAKE: usize = 8 + 1 + 16 + 32 + 1 + 32;
/// Of a frame.
const HEADER: usize = 24;

/// The specs of all ranks, stage after stage.
fn specs(widths: &[usize], listeners: &[Listener]) -> Vec<GroupSpec> {
    let mut addresses = listeners.iter().map(|listener| listener.address().to_string());
    let stages: Vec<Vec<String>> =
        widths.iter().map(|&width| addresses.by_ref().take(width).collect()).collect();
    let secret = Secret::random();
    let spec = |stage, rank| GroupSpec {
        group: "a".into(),
        epoch: (1, 2),
        stage,
        rank,
        stages: stages.clone(),
        secret: secret.clone(),
    };
    let seats = widths.iter().enumerate();
    seats
        .flat_map(|(stage, &width)| (0..width).map(move |rank| (stage, rank)))
        .map(|(s, r)| spec(s, r))
        .collect()
}

fn form_all(specs: Vec<GroupSpec>, listeners: &[Listener]) -> Vec<Result<(TcpTransport, Neighbours)>> {
    each_rank(specs.into_iter().zip(listeners).collect(), |_, (spec, listener)| {
        listener.form(&spec, AbortHandle::default(), LONG)
    })
}

/// What every rank has of a pipeline of these widths, stage after stage.
pub(crate) fn tcp_pipeline(widths: &[usize]) -> Vec<(TcpTransport, Neighbours)> {
    let listeners: Vec<Listener> = (0..widths.iter().sum()).map(|_| listener()).collect();
    form_all(specs(widths, &listeners), &listeners).into_iter().collect::<Result<_>>().unwrap()
}

#[test]
fn every_stage_has_a_collective_of_its_own() {
    let widths = [2, 1, 3];
    // All ends live until the last was asked: who drops his is lost to the others.
    let ends: Vec<_> = tcp_pipeline(&widths)
        .into_iter()
        .map(|(transport, neighbours)| (transport, neighbours.by_host().unwrap()))
        .collect();
    let mut each = ends.iter();
    for (stage, width) in widths.iter().enumerate() {
        for rank in 0..*width {
            let (transport, link) = each.next().unwrap();
            assert_eq!((transport.rank(), transport.size()), (rank, *width));
            assert_eq!((link.stage(), link.stages()), (stage, 3));
            transport.check().unwrap();
        }
    }
}

/// Forms two stages of one rank of which the second was told something else; what either side says.
fn refusal(change: impl Fn(&mut GroupSpec)) -> (String, String) {
    let listeners = [listener(), listener()];
    let [first, mut second] = <[_; 2]>::try_from(specs(&[1, 1], &listeners)).unwrap();
    change(&mut second);
    let before = second.stage - 1;
    let errors = each_rank(vec![first, second], |index, spec| {
        loop {
            let limit = if index == 0 { SHORT } else { LONG };
            let error = listeners[index].form(&spec, AbortHandle::default(), limit).unwrap_err();
            // The accepting side hears of nobody as long as nobody has come.
            if index == 1 || error.to_string().contains("last trouble") {
                return error;
            }
        }
    });
    let of_stage = |error: &Error, of: usize, kind: fn(&Error) -> bool| matches!(error, Error::Stage { stage, source } if *stage == of && kind(source));
    assert!(of_stage(&errors[0], 1, |error| matches!(error, Error::Lost { rank: 0, .. })), "{errors:?}");
    assert!(
        of_stage(&errors[1], before, |error| matches!(error, Error::Refused { rank: 0, .. })),
        "{errors:?}"
    );
    (errors[0].to_string(), errors[1].to_string())
}

#[test]
fn whoever_is_of_another_pipeline_is_refused() {
    for (what, change) in [
        ("another secret", (|spec| spec.secret = Secret::random()) as fn(&mut GroupSpec)),
        ("another group", |spec| spec.group = "b".into()),
        ("epoch", |spec| spec.epoch = (1, 1)),
        ("another size", |spec| spec.stages.push(vec![String::new()])),
        ("another size", |spec| spec.stages[1].push(String::new())),
        ("another size", |spec| {
            // A stage further on, before whom the same rank stands.
            spec.stages.insert(0, vec![String::new()]);
            spec.stage = 2;
        }),
    ] {
        let (accepting, connecting) = refusal(change);
        assert!(accepting.contains(what), "{what}: {accepting}");
        assert!(connecting.contains(what), "{what}: {connecting}");
    }
}

/// Passes on what comes, but for the byte number `at` of what the accepting side says, which gets `mask`.
fn spoil(proxy: &TcpListener, target: &str, at: usize, mask: u8) {
    let (mut caller, _) = proxy.accept().unwrap();
    let mut accepting = TcpStream::connect(target).unwrap();
    let (mut from, mut to) = (caller.try_clone().unwrap(), accepting.try_clone().unwrap());
    let forwards = thread::spawn(move || drop(std::io::copy(&mut from, &mut to)));
    let (mut bytes, mut passed) = ([0; 4096], 0);
    while let Ok(count @ 1..) = accepting.read(&mut bytes) {
        if let Some(byte) = at.checked_sub(passed).and_then(|at| bytes[..count].get_mut(at)) {
            *byte ^= mask;
        }
        passed += count;
        if caller.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // The caller knows by now, and both ends are let go.
    let _ = caller.shutdown(std::net::Shutdown::Both);
    drop(accepting);
    forwards.join().unwrap();
}

/// What the second stage says to a message whose byte `at` was changed on the way.
fn spoilt(at: usize, mask: u8) -> Error {
    let listeners = [listener(), listener()];
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut specs = specs(&[1, 1], &listeners);
    let target = specs[0].stages[0][0].clone();
    specs[1].stages[0][0] = proxy.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        scope.spawn(|| spoil(&proxy, &target, HANDSHAKE + at, mask));
        let ends = form_all(specs, &listeners).into_iter().collect::<Result<Vec<_>>>().unwrap();
        let [(_, first), (_, second)] = <[_; 2]>::try_from(ends).unwrap();
        first.by_host().unwrap().send_rows(vec![1.0; 8]).unwrap();
        second.by_host().unwrap().receive_rows(&mut [0.0; 8]).unwrap_err()
    })
}

#[track_caller]
fn says(error: &Error, what: &str) {
    assert_eq!(error.to_string(), format!("stage 0: rank 0 sent {what}"));
}

#[test]
fn damaged_and_endless_frames_are_refused() {
    says(&spoilt(0, 1), "something that is not a frame");
    says(&spoilt(4, 1), "a message of another call than 0");
    says(&spoilt(HEADER - 5, 0x7f), "a length other than 32 bytes");
    says(&spoilt(HEADER - 1, 1), "a message whose checksum does not fit");
    says(&spoilt(HEADER + 3, 0x10), "a message whose checksum does not fit");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_changed_byte_is_noticed(at in 0..HEADER + 32, mask in 1..=u8::MAX) {
        let error = spoilt(at, mask);
        prop_assert!(matches!(&error, Error::Stage { stage: 0, source } if matches!(**source, Error::Protocol { .. })), "{error}");
    }
}
