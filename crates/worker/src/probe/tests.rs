//! Probes over the loopback, and strangers.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::*;
use tokio::net::{TcpListener, TcpStream};

async fn answering(secret: &Secret) -> (Answering, String) {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let answering = Answering::bind(any, secret.clone()).await.expect("a free port");
    let address = format!("127.0.0.1:{}", answering.port());
    (answering, address)
}

#[tokio::test]
async fn a_link_is_measured() {
    let secret = Secret::random();
    let (_answering, address) = answering(&secret).await;
    let link = probe(&address, &secret, false).await.expect("a link");
    assert!(link.latency > Duration::ZERO && link.bandwidth.is_none(), "{link:?}");
    assert!(link.clock_offset_micros.unsigned_abs() < 1_000_000, "{link:?}");
    let bandwidth = probe(&address, &secret, true).await.expect("a link").bandwidth.expect("measured");
    assert!(bandwidth.least() > 1_000_000, "{bandwidth:?}");
}

#[tokio::test]
async fn strangers_get_nothing() {
    let (_answering, address) = answering(&Secret::random()).await;
    let failure = probe(&address, &Secret::random(), true).await.expect_err("another secret");
    assert_eq!(failure, format!("{address}: it does not know this cluster's secret"));

    for message in [&b"GET / HTTP/1.1\r\n\r\n        "[..], &[0; 100], &MAGIC] {
        let mut stream = TcpStream::connect(&address).await.expect("it listens");
        stream.write_all(message).await.expect("it reads");
        stream.shutdown().await.expect("it is open");
        let mut answer = Vec::new();
        // It may end with a reset, since not all was read.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{answer:?}");
    }
}

#[tokio::test]
async fn requests_are_bounded() {
    let secret = Secret::random();
    let (_answering, address) = answering(&secret).await;
    for (kind, bytes) in [(3, LARGEST_BLOCK + 1), (3, u64::MAX), (2, u64::MAX), (0, 0), (255, 0)] {
        let mut stream = TcpStream::connect(&address).await.expect("it listens");
        initiate(&mut stream, &secret).await.expect("it knows the secret");
        stream.write_all(&[kind]).await.expect("it reads");
        stream.write_all(&u64::to_le_bytes(bytes)).await.expect("it reads");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{kind} {bytes}: {}", answer.len());
    }
    probe(&address, &secret, false).await.expect("others are answered");
}

#[tokio::test]
async fn what_does_not_answer_is_said() {
    let secret = Secret::random();
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = silent.local_addr().expect("an address").to_string();
    assert_eq!(probe(&address, &secret, false).await, Err(format!("{address} does not answer")));
    drop(silent);
    let failure = probe(&address, &secret, false).await.expect_err("nobody listens");
    assert!(failure.contains("refused"), "{failure}");
    let failure = probe("nonsense", &secret, false).await.expect_err("no address");
    assert!(failure.starts_with("nonsense: "), "{failure}");
}

#[tokio::test]
async fn it_ends_when_it_is_dropped() {
    let secret = Secret::random();
    let (answering, address) = answering(&secret).await;
    let mut stream = TcpStream::connect(&address).await.expect("it listens");
    initiate(&mut stream, &secret).await.expect("it knows the secret");
    drop(answering);
    assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0, "the connection is closed");
    let again = TcpListener::bind(&address).await;
    assert!(again.is_ok() || probe(&address, &secret, false).await.is_err());
}
