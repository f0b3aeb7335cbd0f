//! Messages on a byte stream: a header (magic, number of the call, length, CRC-32 of the payload), then the payload.
//!
//! Both sides know every length beforehand, so nothing is allocated for a length read off the wire: it is compared.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::ops::Range;

use crate::collective::{Error, Result};

const MAGIC: Range<usize> = 0..4;
const CALL: Range<usize> = 4..12;
const LENGTH: Range<usize> = 12..20;
const CHECKSUM: Range<usize> = 20..24;
pub(crate) const HEADER_BYTES: usize = 24;

/// A message on its way out.
pub(crate) struct Outgoing<'a> {
    pub(crate) rank: usize,
    header: [u8; HEADER_BYTES],
    payload: &'a [u8],
    sent: usize,
}

impl<'a> Outgoing<'a> {
    pub(crate) fn new(rank: usize, call: u64, payload: &'a [u8]) -> Self {
        Self { rank, header: header(call, payload.len(), crc32fast::hash(payload)), payload, sent: 0 }
    }

    pub(crate) fn done(&self) -> bool {
        self.sent == HEADER_BYTES + self.payload.len()
    }

    /// Sends what the stream takes without blocking; returns whether that was anything.
    pub(crate) fn advance(&mut self, mut stream: impl Write) -> Result<bool> {
        let before = self.sent;
        while !self.done() {
            let result = match self.header.get(self.sent..) {
                Some(header) => stream.write_vectored(&[IoSlice::new(header), IoSlice::new(self.payload)]),
                None => stream.write(&self.payload[self.sent - HEADER_BYTES..]),
            };
            match transferred(self.rank, result)? {
                Some(bytes) => self.sent += bytes,
                None => break,
            }
        }
        Ok(self.sent > before)
    }
}

/// A message on its way in.
pub(crate) struct Incoming<'a> {
    pub(crate) rank: usize,
    call: u64,
    header: [u8; HEADER_BYTES],
    payload: &'a mut [u8],
    received: usize,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(rank: usize, call: u64, payload: &'a mut [u8]) -> Self {
        Self { rank, call, header: [0; HEADER_BYTES], payload, received: 0 }
    }

    pub(crate) fn done(&self) -> bool {
        self.received == HEADER_BYTES + self.payload.len()
    }

    /// Receives what is there without blocking; returns whether that was anything.
    pub(crate) fn advance(&mut self, mut stream: impl Read) -> Result<bool> {
        let before = self.received;
        while !self.done() {
            let in_header = self.received < HEADER_BYTES;
            let result = if in_header {
                let header = IoSliceMut::new(&mut self.header[self.received..]);
                stream.read_vectored(&mut [header, IoSliceMut::new(self.payload)])
            } else {
                stream.read(&mut self.payload[self.received - HEADER_BYTES..])
            };
            match transferred(self.rank, result)? {
                Some(bytes) => self.received += bytes,
                None => break,
            }
            if in_header && self.received >= HEADER_BYTES {
                self.check_header()?;
            }
            if self.done() && self.header[CHECKSUM] != crc32fast::hash(self.payload).to_le_bytes() {
                return Err(self.broken("a message whose checksum does not fit".into()));
            }
        }
        Ok(self.received > before)
    }

    /// All but the checksum.
    fn check_header(&self) -> Result<()> {
        let expected = header(self.call, self.payload.len(), 0);
        let differs = |field: Range<usize>| self.header[field.clone()] != expected[field];
        if differs(MAGIC) {
            Err(self.broken("something that is not a frame".into()))
        } else if differs(CALL) {
            Err(self.broken(format!("a message of another call than {}", self.call)))
        } else if differs(LENGTH) {
            Err(self.broken(format!("a length other than {} bytes", self.payload.len())))
        } else {
            Ok(())
        }
    }

    fn broken(&self, what: String) -> Error {
        Error::Protocol { rank: self.rank, what }
    }
}

fn header(call: u64, length: usize, checksum: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[MAGIC].copy_from_slice(b"PHLX");
    bytes[CALL].copy_from_slice(&call.to_le_bytes());
    bytes[LENGTH].copy_from_slice(&(length as u64).to_le_bytes());
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Bytes of the message that a header begins; it is this process's own.
pub(crate) fn message_bytes(header: &[u8; HEADER_BYTES]) -> usize {
    let length = header[LENGTH].iter().rev().fold(0, |length, byte| length << 8 | u64::from(*byte));
    HEADER_BYTES.saturating_add(usize::try_from(length).unwrap_or(usize::MAX))
}

/// How many bytes went through; none if the stream would block.
fn transferred(rank: usize, result: io::Result<usize>) -> Result<Option<usize>> {
    match result {
        Ok(0) => Err(Error::Lost { rank, source: ErrorKind::UnexpectedEof.into() }),
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
        Err(source) => Err(Error::Lost { rank, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(call: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut message = Outgoing::new(1, call, payload);
        assert!(message.advance(&mut bytes).unwrap() && message.done());
        bytes
    }

    fn receive(bytes: &[u8], call: u64, length: usize) -> Result<Vec<u8>> {
        let mut payload = vec![0; length];
        Incoming::new(1, call, &mut payload).advance(bytes)?;
        Ok(payload)
    }

    /// Gives one byte at a time, and then nothing.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some((first, rest)) = self.0.split_first() else { return Err(ErrorKind::WouldBlock.into()) };
            buffer[0] = *first;
            self.0 = rest;
            Ok(1)
        }
    }

    #[test]
    fn a_message_arrives_whole_or_in_pieces() {
        for payload in [&b""[..], b"a", b"some bytes"] {
            let bytes = sent(7, payload);
            assert_eq!(receive(&bytes, 7, payload.len()).unwrap(), payload);
            for cut in 0..bytes.len() {
                let mut buffer = vec![0; payload.len()];
                let mut message = Incoming::new(1, 7, &mut buffer);
                assert_eq!(message.advance(Trickle(&bytes[..cut])).unwrap(), cut > 0);
                assert!(!message.done());
                assert!(message.advance(Trickle(&bytes[cut..])).unwrap() && message.done());
                assert_eq!(buffer, payload);
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = sent(7, b"payload");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(receive(&bad, 7, 7), Err(Error::Protocol { rank: 1, .. })), "bit {bit}");
        }
    }

    #[test]
    fn other_lengths_and_calls_are_errors() {
        let bytes = sent(7, b"payload");
        let error = |call, length| receive(&bytes, call, length).unwrap_err().to_string();
        assert_eq!(error(7, 6), "rank 1 sent a length other than 6 bytes");
        assert_eq!(error(7, 8), "rank 1 sent a length other than 8 bytes");
        assert_eq!(error(8, 7), "rank 1 sent a message of another call than 8");

        let mut huge = bytes;
        huge[LENGTH].fill(0xff);
        assert!(receive(&huge, 7, 7).is_err());
    }

    #[test]
    fn an_ended_stream_is_a_lost_rank() {
        assert!(matches!(receive(&sent(7, b"payload")[..10], 7, 7), Err(Error::Lost { rank: 1, .. })));
    }
}
