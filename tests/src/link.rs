//! A worker whose link can be cut: packets vanish, and no connection is told. Or it becomes slow.
//!
//! In a network namespace of its own the link is a pair of virtual interfaces. Where these cannot be made, proxies stand
//! between the worker and all that reach it, and stop passing anything on, or take their time.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{sleep, spawn};
use std::time::Duration;

/// Between two looks at a connection that nothing comes from.
const POLL: Duration = Duration::from_millis(5);
/// Between two looks at a link that is cut.
const CUT_POLL: Duration = Duration::from_millis(100);

/// Where a worker runs.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// Its address for others.
    pub host: String,
    /// Where it listens, if not there.
    pub listen: Option<String>,
    /// Its port, if that must be known before.
    pub port: Option<u16>,
    /// Likewise that of its probes.
    pub probe_port: Option<u16>,
    /// Its network namespace, if it has one of its own.
    pub namespace: Option<String>,
}

/// A link that can be cut.
#[derive(Debug)]
pub enum Link {
    /// A namespace, whose worker is at `prefix.last`; all others are in this one, at other addresses of the same prefix.
    Namespace(Namespace),
    /// Proxies on the loopback.
    Proxy(Arc<Passing>),
}

/// What proxies do.
#[derive(Debug, Default)]
pub struct Passing {
    cut: AtomicBool,
    /// Bytes in a second; 0: as they come.
    rate: AtomicU64,
}

/// A network namespace and the link to it. Dropping it removes both.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// The ends of the link, here and in the namespace.
    here: String,
    there: String,
}

impl Link {
    /// A link, and the first three numbers of the addresses at its ends, of which `here` and `there` are the last ones.
    pub fn make(here: &[usize], there: usize) -> (Self, String) {
        match Namespace::make(here, there) {
            Ok((namespace, prefix)) => (Self::Namespace(namespace), prefix),
            Err(_) => (Self::Proxy(Arc::default()), "127.0.0".to_owned()),
        }
    }

    /// How it is cut, for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "network namespace",
            Self::Proxy(_) => "proxy",
        }
    }

    /// Where the worker at its end is to run that is known as `host`, and where it joins a coordinator that is at `join`.
    pub fn place(&self, host: String, join: &str) -> (Place, String) {
        match self {
            Self::Namespace(namespace) => {
                let namespace = Some(namespace.name.clone());
                (Place { host, namespace, ..Place::default() }, join.to_owned())
            }
            Self::Proxy(passing) => {
                let at_join = TcpListener::bind("127.0.0.1:0").expect("a free port");
                let joined_at = at_join.local_addr().expect("an address").to_string();
                pass(at_join, join.parse().expect("an address"), passing);
                let listen = host.replacen("127.0.0.", "127.0.1.", 1);
                let in_front = || {
                    let proxy = TcpListener::bind(format!("{host}:0")).expect("a free port");
                    let port = proxy.local_addr().expect("an address").port();
                    pass(proxy, format!("{listen}:{port}").parse().expect("an address"), passing);
                    Some(port)
                };
                let (port, probe_port) = (in_front(), in_front());
                (Place { host, listen: Some(listen), port, probe_port, namespace: None }, joined_at)
            }
        }
    }

    /// Cuts it.
    pub fn cut(&self) {
        match self {
            Self::Namespace(namespace) => {
                ip(&format!("link set {} down", namespace.here)).expect("the link is there");
            }
            Self::Proxy(passing) => passing.cut.store(true, Ordering::Relaxed),
        }
    }

    /// Has it carry so many megabits in a second, either way.
    pub fn slow(&self, megabits: u64) {
        match self {
            Self::Namespace(Namespace { name, here, there }) => {
                let limit = format!("root tbf rate {megabits}mbit burst 16kb latency 50ms");
                command("tc", &format!("qdisc add dev {here} {limit}")).expect("the link is there");
                command("tc", &format!("-n {name} qdisc add dev {there} {limit}"))
                    .expect("the link is there");
            }
            Self::Proxy(passing) => passing.rate.store(megabits * 1_000_000 / 8, Ordering::Relaxed),
        }
    }

    /// Puts it together again.
    pub fn mend(&self) {
        match self {
            Self::Namespace(namespace) => {
                ip(&format!("link set {} up", namespace.here)).expect("the link is there");
            }
            Self::Proxy(passing) => passing.cut.store(false, Ordering::Relaxed),
        }
    }

    /// Where the worker at its end reaches something at `address` of the loopback; `here` is an address at this end.
    pub fn reach(&self, here: &str, address: &str) -> String {
        match self {
            Self::Namespace(_) => {
                let listener = TcpListener::bind(format!("{here}:0")).expect("a free port");
                let reached_at = listener.local_addr().expect("an address").to_string();
                pass(listener, address.parse().expect("an address"), &Arc::default());
                reached_at
            }
            Self::Proxy(_) => address.to_owned(),
        }
    }
}

impl Namespace {
    fn make(here: &[usize], there: usize) -> Result<(Self, String), String> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let prefix = format!("10.{}.{}", 200 + number % 50, process % 250);
        let (name, here_end) = (format!("phalanx-{process}-{number}"), format!("px{process}h{number}"));
        let there_end = format!("px{process}t{number}");
        ip(&format!("netns add {name}"))?;
        let made = Self { name, here: here_end, there: there_end };
        let Self { name, here: here_end, there: there_end } = &made;
        ip(&format!("link add {here_end} type veth peer name {there_end} netns {name}"))?;
        for last in here {
            ip(&format!("address add {prefix}.{last}/24 dev {here_end}"))?;
        }
        ip(&format!("link set {here_end} up"))?;
        ip(&format!("-n {name} address add {prefix}.{there}/24 dev {there_end}"))?;
        ip(&format!("-n {name} link set {there_end} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok((made, prefix))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.here));
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    command("ip", arguments)
}

fn command(program: &str, arguments: &str) -> Result<(), String> {
    let output =
        Command::new(program).args(arguments.split(' ')).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Passes on what connects to `listener`, both ways, until the link is cut: from then on connections stay open and silent.
fn pass(listener: TcpListener, to: SocketAddr, passing: &Arc<Passing>) {
    let passing = passing.clone();
    spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            if passing.cut.load(Ordering::Relaxed) {
                // Nobody answers; the connection stays open as long as the process lives.
                std::mem::forget(near);
                continue;
            }
            let Ok(far) = TcpStream::connect(to) else { continue };
            for (from, to) in [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))] {
                let (from, to) = (from.expect("a connection"), to.expect("a connection"));
                let passing = passing.clone();
                spawn(move || copy(from, to, &passing));
            }
        }
    });
}

fn copy(mut from: TcpStream, mut to: TcpStream, passing: &Passing) {
    let _ = (from.set_nodelay(true), to.set_nodelay(true), from.set_read_timeout(Some(POLL)));
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = from.read(&mut buffer);
        while passing.cut.load(Ordering::Relaxed) {
            sleep(CUT_POLL);
        }
        if let (Ok(length), rate @ 1..) = (&read, passing.rate.load(Ordering::Relaxed)) {
            sleep(Duration::from_secs(*length as u64) / u32::try_from(rate).unwrap_or(u32::MAX));
        }
        match read {
            Ok(0) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
}
