//! etcd as a process of the test: on free ports, with its data in a folder that goes with it.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// etcd serves within this, or something is wrong.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// A port that was free may be taken before etcd has it.
const STARTS: usize = 5;

/// A running etcd. Dropping it kills it.
#[derive(Debug)]
pub struct Etcd {
    /// Where clients connect.
    pub url: String,
    child: Child,
    arguments: Vec<OsString>,
    health: u16,
    _data: TempDir,
}

impl Etcd {
    /// Starts one without encryption. None where etcd is not installed; then the test says so and skips.
    ///
    /// # Panics
    /// If it does not serve in time, or is not installed though the environment says `PHALANX_REQUIRE_ETCD=1`, so that a CI
    /// machine does not skip unnoticed.
    pub fn start() -> Option<Self> {
        Self::start_with("http", &[])
    }

    /// Starts one whose clients use `scheme`, with more options.
    pub fn start_with(scheme: &str, options: &[OsString]) -> Option<Self> {
        if let Err(error) = Command::new("etcd").arg("--version").output() {
            let absent = format!("no etcd ({error}): install etcd-server");
            assert!(std::env::var("PHALANX_REQUIRE_ETCD").as_deref() != Ok("1"), "{absent}");
            eprintln!("skipped: {absent}");
            return None;
        }
        (0..STARTS).find_map(|_| Self::try_start(scheme, options)).or_else(|| panic!("etcd does not start"))
    }

    fn try_start(scheme: &str, options: &[OsString]) -> Option<Self> {
        let data = tempfile::tempdir().expect("a folder");
        let [client, peer, health] = free_ports();
        let url = format!("{scheme}://127.0.0.1:{client}");
        let peers = format!("http://127.0.0.1:{peer}");
        let mut arguments: Vec<OsString> = vec!["--data-dir".into(), data.path().join("data").into()];
        for (option, value) in [
            ("--listen-client-urls", url.as_str()),
            ("--advertise-client-urls", &url),
            ("--listen-peer-urls", &peers),
            ("--initial-advertise-peer-urls", &peers),
            ("--initial-cluster", &format!("default={peers}")),
            ("--listen-metrics-urls", &format!("http://127.0.0.1:{health}")),
            ("--log-level", "error"),
        ] {
            arguments.extend([option.into(), value.into()]);
        }
        arguments.extend_from_slice(options);
        let mut etcd = Self { url, child: spawn(&arguments), arguments, health, _data: data };
        etcd.wait().then_some(etcd)
    }

    /// Stops it as it is: it answers nothing, and closes nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Has it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it; its data stays.
    pub fn kill(&mut self) {
        self.child.kill().expect("etcd runs");
        self.child.wait().expect("a child");
    }

    /// Starts it again with its data, after [`Self::kill`].
    pub fn restart(&mut self) {
        self.child = spawn(&self.arguments);
        assert!(self.wait(), "etcd does not start again");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("etcd runs");
    }

    /// Whether it serves before it ends.
    fn wait(&mut self) -> bool {
        let deadline = Instant::now() + LIMIT;
        while !healthy(self.health) {
            assert!(Instant::now() < deadline, "etcd does not serve");
            if self.child.try_wait().expect("a child").is_some() {
                return false;
            }
            sleep(POLL);
        }
        true
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(arguments: &[OsString]) -> Child {
    let mut command = Command::new("etcd");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("etcd starts")
}

fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("an address").port())
}

/// Whether it says that it has a leader and answers.
fn healthy(port: u16) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains("\"health\":\"true\""))
}
