//! Who is let into a group over TCP, who is not, and what both sides are told.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use auth::Secret;
use comm::{AbortHandle, Error, GroupSpec, Listener, Result, TcpTransport, Transport};

use crate::groups::{LONG, each_rank, listener, spec};

/// How long rank 0 waits for a peer that is not let in, before it says why.
const SHORT: Duration = Duration::from_millis(100);

fn form(listener: &Listener, spec: &GroupSpec, limit: Duration) -> Result<TcpTransport> {
    Ok(listener.form(spec, AbortHandle::default(), limit)?.0)
}

/// Tries to form a group until somebody who came was not let in.
fn trouble(listener: &Listener, spec: &GroupSpec) -> Error {
    loop {
        let error = form(listener, spec, SHORT).unwrap_err();
        if error.to_string().contains("last trouble") {
            return error;
        }
    }
}

/// Forms a group of two of which rank 1 was told something else; returns what either side says.
fn refusal(change: impl Fn(&mut GroupSpec) + Sync) -> (String, String) {
    let listeners = [listener(), listener()];
    let secret = Secret::random();
    let errors = each_rank(listeners.iter().collect(), |rank, listener: &Listener| {
        let mut spec = spec(rank, &listeners, &secret);
        if rank == 0 {
            return trouble(listener, &spec);
        }
        change(&mut spec);
        form(listener, &spec, LONG).unwrap_err()
    });
    let [accepting, connecting] = <[Error; 2]>::try_from(errors).unwrap();
    assert!(matches!(accepting, Error::Lost { rank: 1, .. }), "{accepting}");
    assert!(matches!(connecting, Error::Refused { rank: 0, .. }), "{connecting}");
    (accepting.to_string(), connecting.to_string())
}

#[test]
fn another_secret_is_refused() {
    let (accepting, connecting) = refusal(|spec| spec.secret = Secret::random());
    assert!(accepting.contains("another secret"), "{accepting}");
    assert!(connecting.contains("another secret"), "{connecting}");
}

#[test]
fn another_group_is_refused() {
    let (accepting, connecting) = refusal(|spec| spec.group = "b".into());
    assert!(accepting.contains("another group"), "{accepting}");
    assert!(connecting.contains("another group"), "{connecting}");
}

#[test]
fn an_older_epoch_is_refused() {
    let (accepting, connecting) = refusal(|spec| spec.epoch = (1, 1));
    assert!(accepting.contains("it is in epoch 1.1, this rank in 1.2"), "{accepting}");
    assert!(connecting.contains("it is in epoch 1.2, this rank in 1.1"), "{connecting}");
}

#[test]
fn another_size_is_refused() {
    let (accepting, connecting) = refusal(|spec| spec.stages[0].push("nowhere:1".into()));
    assert!(accepting.contains("another size"), "{accepting}");
    assert!(connecting.contains("another size"), "{connecting}");
}

#[test]
fn a_peer_that_is_no_worker_is_an_error() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    let web_server = thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        stream.write_all(&b"HTTP/1.1 400 Bad Request\r\n".repeat(4)).unwrap();
        // Until the other side has read it and gone.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let own = listener();
    let mut spec = spec(0, &[own], &Secret::random());
    spec.rank = 1;
    spec.stages = vec![vec![address.clone(), address]];
    let error = form(&listener(), &spec, LONG).unwrap_err();
    assert!(error.to_string().contains("no phalanx worker"), "{error}");
    web_server.join().unwrap();
}

/// Rank 0 is still in the epoch before when rank 1 calls: rank 1 waits for it.
#[test]
fn a_peer_in_an_older_epoch_is_waited_for() {
    let listeners = [listener(), listener()];
    let secret = Secret::random();
    each_rank(listeners.iter().collect(), |rank, listener: &Listener| {
        let mut spec = spec(rank, &listeners, &secret);
        if rank == 0 {
            spec.epoch = (1, 1);
            let error = trouble(listener, &spec);
            assert!(error.to_string().contains("it is in epoch 1.2, this rank in 1.1"), "{error}");
            spec.epoch = (1, 2);
        }
        form(listener, &spec, LONG).unwrap();
    });
}

#[test]
fn strangers_do_no_harm() {
    let listeners: Vec<Listener> = (0..3).map(|_| listener()).collect();
    let secret = Secret::random();
    let mut strangers = Vec::new();
    for listener in &listeners {
        for greeting in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"phalanx\0", &[0xff; 4096]] {
            let mut stream = TcpStream::connect(listener.address()).unwrap();
            stream.write_all(greeting).unwrap();
            strangers.push(stream);
        }
        drop(TcpStream::connect(listener.address()).unwrap());
    }
    let started = Instant::now();
    let ends = each_rank(listeners.iter().collect(), |rank, listener: &Listener| {
        form(listener, &spec(rank, &listeners, &secret), LONG).unwrap()
    });
    assert!(started.elapsed() < Duration::from_secs(2), "silent strangers held up the group");
    assert_eq!(ends.iter().map(Transport::rank).collect::<Vec<_>>(), [0, 1, 2]);
    // None of them is left hanging, either. One that the group did not come to accept hears of it when the listener goes.
    drop(listeners);
    for mut stranger in strangers {
        let _ = stranger.read_to_end(&mut Vec::new());
    }
}

#[test]
fn a_listener_serves_one_epoch_after_another() {
    let listeners: Vec<Listener> = (0..3).map(|_| listener()).collect();
    let secret = Secret::random();
    each_rank(listeners.iter().collect(), |rank, listener: &Listener| {
        for counter in 0..5 {
            let mut spec = spec(rank, &listeners, &secret);
            spec.epoch.1 = counter;
            let mut transport = form(listener, &spec, LONG).unwrap();
            let others = || (0..3).filter(|other| *other != rank);
            let mut inboxes = [[0; 1]; 3];
            let incoming = inboxes.iter_mut().enumerate().filter(|(from, _)| *from != rank);
            let mut incoming: Vec<_> = incoming.map(|(from, inbox)| (from, &mut inbox[..])).collect();
            let greeting = [rank as u8];
            let outgoing: Vec<_> = others().map(|to| (to, &greeting[..])).collect();
            transport.exchange(&outgoing, &mut incoming).unwrap();
            assert!(others().all(|other| inboxes[other][0] == other as u8));
        }
    });
}

#[test]
fn a_missing_peer_is_named() {
    let listeners = [listener(), listener(), listener()];
    let secret = Secret::random();
    let errors = each_rank(listeners[..2].iter().collect(), |rank, listener: &Listener| {
        form(listener, &spec(rank, &listeners, &secret), SHORT).unwrap_err()
    });
    assert!(errors.iter().all(|error| matches!(error, Error::Lost { rank: 2, .. })), "{errors:?}");
}

/// Rank 1 waits for a rank below that never answers and for one above that never calls.
#[test]
fn abort_frees_a_rank_that_forms() {
    let listeners = [listener(), listener(), listener()];
    let secret = Secret::random();
    let abort = AbortHandle::default();
    let handle = abort.clone();
    let told = thread::spawn(move || {
        // Whether it waits by now or not, the flag frees it.
        thread::sleep(Duration::from_millis(30));
        handle.abort();
        Instant::now()
    });
    let error = listeners[1].form(&spec(1, &listeners, &secret), abort, LONG).unwrap_err();
    let freed = Instant::now();
    assert!(matches!(error, Error::Aborted), "{error}");
    assert!(freed.saturating_duration_since(told.join().unwrap()) < Duration::from_millis(500));
}

#[test]
fn a_false_spec_is_an_error() {
    let own = [listener()];
    let secret = Secret::random();
    let with = |change: fn(&mut GroupSpec)| {
        let mut spec = spec(0, &own, &secret);
        change(&mut spec);
        form(&own[0], &spec, LONG)
    };
    assert!(with(|_| {}).is_ok_and(|transport| transport.size() == 1));
    assert!(matches!(with(|spec| spec.rank = 1), Err(Error::Shape { .. })));
    assert!(matches!(with(|spec| spec.stage = 1), Err(Error::Shape { .. })));
    assert!(matches!(with(|spec| spec.stages.push(vec![])), Err(Error::Shape { .. })));
    assert!(matches!(with(|spec| spec.group = "x".repeat(65)), Err(Error::Shape { .. })));
}
