//! The side that measures.

use std::io;
use std::time::Duration;

use auth::Secret;
use cluster::doctor::{Bandwidth, Link, Probed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::{CHUNK, LARGEST_BLOCK, Request, clock, initiate, pour, swallow};

/// Until a connection stands and both sides have proven themselves.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Messages there and back, as far as there is time.
const ECHOES: usize = 50;
const ECHOES_LIMIT: Duration = Duration::from_millis(200);
/// The time that all messages may take where not even one came back.
const SILENCE: Duration = Duration::from_secs(1);
const FIRST_BLOCK: u64 = 64 << 10;
/// No block is begun that would probably not be through by then.
const BLOCKS_LIMIT: Duration = Duration::from_millis(150);
/// A block that takes longer is given up.
const BLOCK_LIMIT: Duration = Duration::from_secs(1);

/// Measures the link to the worker that answers at `address`; in the error it is said what is wrong there.
pub(crate) async fn probe(address: &str, secret: &Secret, bandwidth: bool) -> Probed {
    let failed = |error: &io::Error| format!("{address}: {error}");
    let mut stream = match timeout(CONNECT_LIMIT, connect(address, secret)).await {
        Ok(connected) => connected.map_err(|error| failed(&error))?,
        Err(_) => return Err(format!("{address} does not answer")),
    };
    let mut link = match timeout(SILENCE, echoes(&mut stream)).await {
        Ok(link) => link.map_err(|error| failed(&error))?,
        Err(_) => return Err(format!("{address} does not answer")),
    };
    if bandwidth {
        link.bandwidth = Some(carried(&mut stream).await.map_err(|error| failed(&error))?);
    }
    Ok(link)
}

async fn connect(address: &str, secret: &Secret) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    initiate(&mut stream, secret).await?;
    Ok(stream)
}

/// Latency and clocks. The message that came back soonest tells most of the clocks.
async fn echoes(stream: &mut TcpStream) -> io::Result<Link> {
    let began = Instant::now();
    let mut found: Vec<(Duration, i64)> = Vec::with_capacity(ECHOES);
    while found.len() < ECHOES && (found.is_empty() || began.elapsed() < ECHOES_LIMIT) {
        let (sent, sent_at) = (Instant::now(), clock());
        ask(stream, Request::Echo, 0).await?;
        let mut times = [0; 16];
        stream.read_exact(&mut times).await?;
        let (took, back_at) = (sent.elapsed(), clock());
        let [arrived, answered] = [0, 8].map(|from| {
            let mut time = [0; 8];
            time.copy_from_slice(&times[from..from + 8]);
            i64::from_le_bytes(time)
        });
        found.push((took, offset(sent_at, arrived, answered, back_at)));
    }
    found.sort_unstable();
    let clock_offset_micros = found.first().map_or(0, |(_, offset)| *offset);
    Ok(Link { latency: found[found.len() / 2].0, clock_offset_micros, bandwidth: None })
}

/// How far the other clock is ahead, if the message took as long there as back (RFC 5905, section 8).
fn offset(sent: i64, arrived: i64, answered: i64, back: i64) -> i64 {
    let [sent, arrived, answered, back] = [sent, arrived, answered, back].map(i128::from);
    let offset = ((arrived - sent) + (answered - back)) / 2;
    i64::try_from(offset).unwrap_or(if offset > 0 { i64::MAX } else { i64::MIN })
}

/// Bytes in a second, each way.
async fn carried(stream: &mut TcpStream) -> io::Result<Bandwidth> {
    let mut chunk = vec![0; CHUNK];
    let (there, whole) = blocks(stream, Request::Take, &mut chunk).await?;
    // What was given up half-way is followed by nothing that makes sense.
    let back = if whole { blocks(stream, Request::Give, &mut chunk).await?.0 } else { there };
    Ok(Bandwidth { there, back })
}

/// Has larger and larger blocks carried one way, each after the one before it has arrived: so nothing piles up on a slow link that
/// would hold up the heartbeats on it. The best of their rates, and whether all arrived.
async fn blocks(stream: &mut TcpStream, way: Request, chunk: &mut [u8]) -> io::Result<(u64, bool)> {
    let began = Instant::now();
    let (mut bytes, mut best) = (FIRST_BLOCK, 0);
    loop {
        let sent = Instant::now();
        let arrived = timeout(BLOCK_LIMIT, block(stream, way, bytes, chunk)).await;
        let took = sent.elapsed();
        let rate = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
        best = best.max(u64::try_from(rate).unwrap_or(u64::MAX));
        match arrived {
            Ok(arrived) => arrived?,
            Err(_) => return Ok((best, false)),
        }
        if bytes >= LARGEST_BLOCK || began.elapsed() + 2 * took > BLOCKS_LIMIT {
            return Ok((best, true));
        }
        bytes *= 2;
    }
}

async fn block(stream: &mut TcpStream, way: Request, bytes: u64, chunk: &mut [u8]) -> io::Result<()> {
    ask(stream, way, bytes).await?;
    if way == Request::Give {
        return swallow(stream, bytes, chunk).await;
    }
    pour(stream, bytes, chunk).await?;
    stream.read_u8().await.map(drop)
}

async fn ask(stream: &mut TcpStream, request: Request, bytes: u64) -> io::Result<()> {
    let mut message = [request as u8; 9];
    message[1..].copy_from_slice(&bytes.to_le_bytes());
    stream.write_all(&message).await
}

#[cfg(test)]
mod tests {
    use super::offset;

    #[test]
    fn the_offset_is_what_clocks_differ_by() {
        // 10 each way and 5 in between, with clocks that are 1000 apart.
        assert_eq!(offset(100, 1110, 1115, 125), 1000);
        assert_eq!(offset(1100, 110, 115, 1125), -1000);
        assert_eq!(offset(i64::MIN, i64::MAX, i64::MAX, i64::MIN), i64::MAX);
        assert_eq!(offset(i64::MAX, i64::MIN, i64::MIN, i64::MAX), i64::MIN);
    }
}
