//! Wires that fail on purpose, and what the other ranks see of it.

use auth::Secret;
use comm::{AbortHandle, Error, GroupSpec, Result, TcpTransport, Transport, WireFault, Wires};

use crate::groups::{LONG, each_rank, listener};

/// Three ranks, of which the first has these wires.
fn transports(wires: &Wires) -> Vec<TcpTransport> {
    let listeners = [(); 3].map(|()| listener());
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let secret = Secret::random();
    each_rank(listeners.into(), |rank, listener| {
        let stages = vec![addresses.clone()];
        let spec =
            GroupSpec { group: "a".into(), epoch: (1, 2), stage: 0, rank, stages, secret: secret.clone() };
        let formed = match rank {
            0 => listener.form_over(wires, &spec, AbortHandle::default(), LONG),
            _ => listener.form(&spec, AbortHandle::default(), LONG),
        };
        formed.unwrap().0
    })
}

/// Every rank sends `bytes` of its number to all others.
fn exchange(transport: &mut TcpTransport, bytes: usize) -> Result<()> {
    let others: Vec<usize> = (0..3).filter(|rank| *rank != transport.rank()).collect();
    let own = vec![transport.rank() as u8; bytes];
    let mut theirs: Vec<Vec<u8>> = others.iter().map(|_| vec![9; bytes]).collect();
    let outgoing: Vec<_> = others.iter().map(|to| (*to, &own[..])).collect();
    let mut incoming: Vec<_> = others.iter().copied().zip(theirs.iter_mut().map(|t| &mut t[..])).collect();
    transport.exchange(&outgoing, &mut incoming)?;
    others.iter().zip(theirs).for_each(|(from, theirs)| assert_eq!(theirs, vec![*from as u8; bytes]));
    Ok(())
}

#[test]
fn what_is_not_tampered_with_arrives() {
    for bytes in [0, 1, 100, 1 << 20] {
        let done = each_rank(transports(&Wires::default()), |_, mut transport| {
            (0..3).try_for_each(|_| exchange(&mut transport, bytes))
        });
        assert!(done.iter().all(Result::is_ok), "{done:?}");
    }
}

#[test]
fn a_flipped_bit_is_noticed_and_its_sender_named() {
    for bytes in [0, 1, 1 << 20] {
        let wires = Wires::default();
        let all = transports(&wires);
        wires.strike(WireFault::Corrupt);
        let named = each_rank(all, |rank, mut transport| {
            let error = exchange(&mut transport, bytes).err()?;
            let sender = matches!(error, Error::Protocol { rank: 0, .. });
            // Whoever notices it leaves, which the others notice.
            (rank > 0 && sender).then_some(rank)
        });
        assert_eq!(named.iter().flatten().count(), 1, "{named:?}");
    }
}

#[test]
fn a_lost_message_is_waited_for() {
    let wires = Wires::default();
    let mut all = transports(&wires);
    wires.strike(WireFault::Drop);
    let handles: Vec<_> = all.iter().map(Transport::abort_handle).collect();
    let results = std::thread::scope(|scope| {
        let ranks: Vec<_> = all
            .iter_mut()
            .map(|transport| scope.spawn(|| (0..2).try_for_each(|_| exchange(transport, 10))))
            .collect();
        // The first rank and the other one come to the second exchange, and wait for the one that has not heard.
        while handles.iter().filter(|handle| handle.waits_for() == Some(0)).count() == 0
            || handles.iter().any(|handle| handle.waits_for().is_none())
        {
            std::thread::yield_now();
        }
        handles.iter().for_each(AbortHandle::abort);
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(results.iter().all(|result| matches!(result, Err(Error::Aborted))), "{results:?}");
}

#[test]
fn a_cut_is_a_lost_rank() {
    let wires = Wires::default();
    let all = transports(&wires);
    wires.strike(WireFault::Cut);
    let results = each_rank(all, |_, mut transport| exchange(&mut transport, 10));
    let lost = |rank| matches!(results[rank], Err(Error::Lost { rank: 0, .. }));
    assert!(results[0].is_err() && (lost(1) || lost(2)), "{results:?}");
}
