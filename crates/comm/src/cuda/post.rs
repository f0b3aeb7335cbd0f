//! File descriptors that go from rank to rank on one machine, by a Unix socket of each.
//!
//! Sockets have random names that no file stands for, so nothing is left over when a process is killed. Everybody can send to one who
//! learns its name: what counts comes with the receiver's nonce, which the ranks tell each other on their proven mesh. Ranks in
//! containers with networks of their own do not reach each other this way.

use std::fmt::Display;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use auth::Nonce;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, recvmsg, sendmsg_addr,
    socket_with,
};

use super::offer::{Place, hex};
use crate::collective::Result;

/// Changes when the machine is started again; its containers have the same.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Descriptors of one message.
const MAX_FILES: usize = 2;
/// The receiver's nonce, and the sender's rank.
const MESSAGE_BYTES: usize = 32 + 1;
/// How long a wait sleeps before it looks again whether it is still wanted.
const SLEEP: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

/// A rank's own socket.
#[derive(Debug)]
pub(super) struct Post {
    socket: OwnedFd,
    place: Place,
}

impl Post {
    /// Opens it, or says why it cannot.
    pub(super) fn open() -> std::result::Result<Self, String> {
        let boot = std::fs::read_to_string(BOOT_ID).map_err(|error| format!("{BOOT_ID}: {error}"))?;
        let digits: String = boot.chars().filter(char::is_ascii_hexdigit).take(32).collect();
        let machine =
            u128::from_str_radix(&digits, 16).map_err(|_| format!("{BOOT_ID} holds '{}'", boot.trim()))?;
        let (Nonce(name), Nonce(nonce)) = (Nonce::random(), Nonce::random());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
            .and_then(|socket| {
                bind(&socket, &address(&name)?)?;
                Ok(socket)
            })
            .map_err(|error| format!("it cannot open a Unix socket: {error}"))?;
        Ok(Self { socket, place: Place { machine: machine.to_be_bytes(), name, nonce } })
    }

    /// Where the others send to.
    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// Sends `own` to all other ranks, and waits for what they send, which is given by rank (nothing for this one). `go_on` is
    /// asked while this waits; whatever it fails with ends the group.
    ///
    /// # Errors
    /// Inside: why it cannot be done, in a sentence for users.
    pub(super) fn trade(
        &self,
        rank: usize,
        places: &[Place],
        own: &[BorrowedFd<'_>],
        deadline: Instant,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<std::result::Result<Vec<Vec<OwnedFd>>, String>> {
        let mut unsent: Vec<usize> = (0..places.len()).filter(|to| *to != rank).collect();
        let mut received: Vec<Option<Vec<OwnedFd>>> = places.iter().map(|_| None).collect();
        received[rank] = Some(Vec::new());
        loop {
            let mut later = Vec::new();
            for to in unsent {
                match self.send(rank, &places[to], own) {
                    Ok(()) => {}
                    Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => later.push(to),
                    Err(error) => return Ok(Err(unreachable(to, &error))),
                }
            }
            unsent = later;
            while let Some((from, files)) = self.receive(places.len()) {
                received[from] = Some(files);
            }
            let missing = received.iter().position(Option::is_none).or(unsent.first().copied());
            let Some(missing) = missing else {
                return Ok(Ok(received.into_iter().flatten().collect()));
            };
            if Instant::now() > deadline {
                return Ok(Err(unreachable(missing, &"nothing came in time")));
            }
            go_on()?;
            // A poll that fails is only an early look.
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&SLEEP));
        }
    }

    fn send(&self, rank: usize, to: &Place, files: &[BorrowedFd<'_>]) -> std::result::Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(Errno::MSGSIZE);
        }
        let mut message = to.nonce.to_vec();
        message.push(rank as u8);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg_addr(&self.socket, &address(&to.name)?, &[IoSlice::new(&message)], &mut control, flags)
            .map(drop)
    }

    /// The next message of a rank that has come. Those of strangers are dropped.
    fn receive(&self, size: usize) -> Option<(usize, Vec<OwnedFd>)> {
        loop {
            let mut message = [0; MESSAGE_BYTES + 1];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received =
                recvmsg(&self.socket, &mut [IoSliceMut::new(&mut message)], &mut control, flags).ok()?;
            let files: Vec<OwnedFd> = control
                .drain()
                .filter_map(|part| match part {
                    RecvAncillaryMessage::ScmRights(files) => Some(files),
                    _ => None,
                })
                .flatten()
                .collect();
            let rank = usize::from(message[MESSAGE_BYTES - 1]);
            let whole = received.bytes == MESSAGE_BYTES && !received.flags.contains(ReturnFlags::CTRUNC);
            if whole && message[..32] == self.place.nonce && rank < size {
                return Some((rank, files));
            }
        }
    }
}

fn address(name: &[u8; 32]) -> std::result::Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new_abstract_name(format!("phalanx-{}", hex(name)).as_bytes())
}

fn unreachable(rank: usize, why: &dyn Display) -> String {
    format!(
        "rank {rank} is not reached by a socket of this machine ({why}): ranks in containers need one network"
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;
    use crate::collective::Error;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// A pipe for each rank: all others can write to it.
    #[test]
    fn descriptors_arrive_whole_though_strangers_send_too() {
        let posts: Vec<Post> = (0..12).map(|_| Post::open().unwrap()).collect();
        let places: Vec<Place> = posts.iter().map(Post::place).collect();
        let stranger = Post::open().unwrap();
        let garbage = Place { nonce: [0; 32], ..places[0] };
        stranger.send(1, &garbage, &[stranger.socket.as_fd()]).unwrap();
        let read = std::thread::scope(|scope| {
            let places = &places;
            let threads: Vec<_> = posts
                .iter()
                .enumerate()
                .map(|(rank, post)| {
                    scope.spawn(move || {
                        let (mut reader, writer) = std::io::pipe().unwrap();
                        let own = [writer.as_fd(), writer.as_fd()];
                        let own = if rank == 0 { &own[..] } else { &own[..1] };
                        let traded = post.trade(rank, places, own, soon(), &mut || Ok(())).unwrap().unwrap();
                        drop(writer);
                        for (from, files) in traded.into_iter().enumerate() {
                            let expected = if from == rank { 0 } else { 1 + usize::from(from == 0) };
                            assert_eq!(files.len(), expected, "of rank {from}");
                            if let Some(file) = files.into_iter().next() {
                                std::io::PipeWriter::from(file).write_all(&[rank as u8]).unwrap();
                            }
                        }
                        let mut heard = Vec::new();
                        reader.read_to_end(&mut heard).unwrap();
                        heard.sort_unstable();
                        heard
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for (rank, heard) in read.into_iter().enumerate() {
            assert!(
                heard.iter().copied().eq((0..12).filter(|other| usize::from(*other) != rank)),
                "{heard:?}"
            );
        }
    }

    #[test]
    fn one_who_is_not_of_this_machine_is_told() {
        let (here, away) = (Post::open().unwrap(), Post::open().unwrap().place());
        let own = [here.socket.as_fd()];
        let why = here.trade(0, &[here.place(), away], &own, soon(), &mut || Ok(())).unwrap().unwrap_err();
        assert!(why.contains("rank 1 is not reached") && why.contains("refused"), "{why}");
    }

    #[test]
    fn silence_has_a_limit_and_a_group_that_is_lost_does_not_wait() {
        let (here, silent) = (Post::open().unwrap(), Post::open().unwrap());
        let places = [here.place(), silent.place()];
        let own = [here.socket.as_fd()];
        let why = here.trade(0, &places, &own, Instant::now(), &mut || Ok(())).unwrap().unwrap_err();
        assert!(why.contains("rank 1") && why.contains("in time"), "{why}");
        let lost = here.trade(0, &places, &own, soon(), &mut || Err(Error::Aborted));
        assert!(matches!(lost, Err(Error::Aborted)));
    }
}
