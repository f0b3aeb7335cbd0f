//! Probes between workers: how far they are from each other, by their clocks too, and how much the link between them carries.
//!
//! ```text
//! initiator → responder   magic, nonce
//! responder → initiator   magic, nonce
//! initiator → responder   proof
//! responder → initiator   proof
//! initiator → responder   any number of requests: kind, number of bytes
//!                         echo: is answered with the time of its arrival and that of the answer
//!                         take: these bytes follow, and one comes back when all have arrived
//!                         give: these bytes come back
//! ```
//! The initiator proves first that it knows the cluster's secret, so a stranger gets nothing. All has its own port and tasks, apart from
//! the collectives and from the thread that computes: so it works whatever that does.

mod answer;
mod measure;
#[cfg(test)]
mod tests;

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use auth::{Nonce, Proof, Role, Secret};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub(crate) use answer::Answering;
pub(crate) use measure::probe;

const MAGIC: [u8; 8] = *b"phxprobe";
/// Raised with every change of these messages.
const CONTEXT: &[u8] = b"phalanx probe, version 1";
/// Bytes that a request may ask for.
const LARGEST_BLOCK: u64 = 64 << 20;
/// Bytes that are read or written at once.
const CHUNK: usize = 256 << 10;

/// What is asked for; its number is that on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Echo = 1,
    Take = 2,
    Give = 3,
}

impl Request {
    fn of(number: u8) -> Option<Self> {
        [Self::Echo, Self::Take, Self::Give].into_iter().find(|request| *request as u8 == number)
    }
}

/// The connecting side.
async fn initiate(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), secret: &Secret) -> io::Result<()> {
    let ours = Nonce::random();
    send_nonce(stream, &ours).await?;
    let theirs = receive_nonce(stream).await?;
    stream.write_all(&secret.prove(Role::Initiator, CONTEXT, &ours, &theirs).0).await?;
    let mut proof = Proof([0; 32]);
    let answered = stream.read_exact(&mut proof.0).await;
    if answered.is_err() || !secret.verify(Role::Responder, CONTEXT, &ours, &theirs, &proof) {
        return Err(io::Error::other("it does not know this cluster's secret"));
    }
    Ok(())
}

/// The accepting side.
async fn respond(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), secret: &Secret) -> io::Result<()> {
    let theirs = receive_nonce(stream).await?;
    let ours = Nonce::random();
    send_nonce(stream, &ours).await?;
    let mut proof = Proof([0; 32]);
    stream.read_exact(&mut proof.0).await?;
    if !secret.verify(Role::Initiator, CONTEXT, &theirs, &ours, &proof) {
        return Err(io::Error::other("it does not know this cluster's secret"));
    }
    stream.write_all(&secret.prove(Role::Responder, CONTEXT, &theirs, &ours).0).await
}

async fn send_nonce(stream: &mut (impl AsyncWrite + Unpin), nonce: &Nonce) -> io::Result<()> {
    let mut message = [0; 40];
    message[..8].copy_from_slice(&MAGIC);
    message[8..].copy_from_slice(&nonce.0);
    stream.write_all(&message).await
}

async fn receive_nonce(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Nonce> {
    let (mut magic, mut nonce) = ([0; 8], Nonce([0; 32]));
    stream.read_exact(&mut magic).await?;
    if magic != MAGIC {
        return Err(io::Error::other("it is no phalanx worker of this version"));
    }
    stream.read_exact(&mut nonce.0).await?;
    Ok(nonce)
}

/// Reads so many bytes, and forgets them.
async fn swallow(stream: &mut (impl AsyncRead + Unpin), mut bytes: u64, chunk: &mut [u8]) -> io::Result<()> {
    while bytes > 0 {
        let most = chunk.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        match stream.read(&mut chunk[..most]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => bytes -= read as u64,
        }
    }
    Ok(())
}

/// Writes so many bytes, whatever they are.
async fn pour(stream: &mut (impl AsyncWrite + Unpin), mut bytes: u64, chunk: &[u8]) -> io::Result<()> {
    while bytes > 0 {
        let most = chunk.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        stream.write_all(&chunk[..most]).await?;
        bytes -= most as u64;
    }
    Ok(())
}

/// Microseconds since 1970, by this machine's clock.
fn clock() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
