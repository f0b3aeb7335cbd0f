//! The program as processes of the test: started, watched, ended, and looked for afterwards.
//!
//! Every start gets a mark in its environment, which the processes that it starts inherit. So whatever it leaves over is
//! found, also when its parent is gone, and tests that run side by side do not see each other's.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, getpgid, kill_process};

/// Nothing here takes so long, unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);
const MARK: &str = "PHALANX_TEST_MARK";

/// The path of the program: `env!("CARGO_BIN_EXE_phalanx-under-test")` of the test.
#[derive(Debug, Clone, Copy)]
pub struct Program(pub &'static str);

impl Program {
    /// A command line that has not been started.
    pub fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Invocation {
        self.invocation(Command::new(self.0), args)
    }

    /// The same in a network namespace.
    pub fn command_in<A: AsRef<OsStr>>(
        &self,
        namespace: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Invocation {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, self.0]);
        self.invocation(command, args)
    }

    fn invocation<A: AsRef<OsStr>>(
        &self,
        mut command: Command,
        args: impl IntoIterator<Item = A>,
    ) -> Invocation {
        static STARTS: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}-", std::process::id(), STARTS.fetch_add(1, Ordering::Relaxed));
        command
            .args(args)
            .env(MARK, &mark)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for variable in ["PHALANX_MODEL", "PHALANX_SECRET", "RUST_LOG"] {
            command.env_remove(variable);
        }
        Invocation { command, mark, input: None }
    }

    /// Starts the program and waits for its end.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Ended {
        self.command(args).run()
    }
}

/// A command line.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    mark: String,
    input: Option<String>,
}

impl Invocation {
    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// What the program reads from its standard input.
    pub fn input(mut self, text: &str) -> Self {
        self.command.stdin(Stdio::piped());
        self.input = Some(text.to_owned());
        self
    }

    /// Starts it and waits for its end.
    pub fn run(self) -> Ended {
        self.start().end()
    }

    /// Starts it.
    pub fn start(mut self) -> Phalanx {
        let mut child = self.command.spawn().expect("the program starts");
        if let (Some(text), Some(mut stdin)) = (self.input, child.stdin.take()) {
            stdin.write_all(text.as_bytes()).expect("the program has an input");
        }
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (sender, lines) = channel();
        spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8(line).expect("UTF-8 on the standard output")).is_err() {
                    return;
                }
            }
        });
        let stderr = Some(spawn(move || {
            let mut text = Vec::new();
            let _ = BufReader::new(stderr).read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        }));
        Phalanx { child, mark: self.mark, lines, stderr }
    }
}

/// A running program. Dropping it kills it and all that it started.
#[derive(Debug)]
pub struct Phalanx {
    child: Child,
    mark: String,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Phalanx {
    /// The next line of its standard output that `wanted` maps to something.
    pub fn line<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(found) = wanted(&line) {
                        return found;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("the line does not come; {}", self.kill()),
                Err(RecvTimeoutError::Disconnected) => panic!("ended before the line came: {}", self.kill()),
            }
        }
    }

    /// Waits for the ready line of `serve`; returns where it serves.
    pub fn served_at(&mut self) -> String {
        self.line(|line| {
            line.strip_prefix("serving ")?;
            Some(line.rsplit_once(" at ")?.1.to_owned())
        })
    }

    /// Waits for the first line of `coordinator`; returns where workers join, and where clients connect.
    pub fn coordinates_at(&mut self) -> (String, String) {
        self.line(|line| {
            let (join, address) =
                line.strip_prefix("workers join at ")?.split_once(", clients connect at ")?;
            Some((join.to_owned(), address.to_owned()))
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the program itself.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the program runs");
    }

    /// Waits until the program itself has ended.
    pub fn wait(&mut self) {
        self.child.wait().expect("a child");
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if Instant::now() > deadline {
                panic!("the program does not end; {}", self.kill());
            }
            sleep(POLL);
        };
        let left = marked(&self.mark);
        for process in &left {
            process.signal(Signal::KILL);
        }
        let stdout = self.lines.iter().fold(String::new(), |text, line| text + &line + "\n");
        let stderr = self.stderr.take().map(|thread| thread.join().expect("no panic")).unwrap_or_default();
        Ended { status, stdout, stderr, left }
    }

    /// Kills the program alone, and waits until everything that it started has left by itself.
    pub fn end_by_kill(mut self) {
        self.child.kill().expect("the program runs");
        self.child.wait().expect("a child");
        let deadline = Instant::now() + LIMIT;
        while !marked(&self.mark).is_empty() {
            assert!(Instant::now() < deadline, "left over: {:?}", marked(&self.mark));
            sleep(POLL);
        }
    }

    /// Its worker processes.
    pub fn workers(&self) -> Vec<Process> {
        marked(&self.mark).into_iter().filter(|p| p.args.contains(" worker --leave-with-stdin")).collect()
    }

    /// Waits until it has started so many worker processes.
    pub fn wait_for_workers(&self, count: usize) -> Vec<Process> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let workers = self.workers();
            if workers.len() >= count {
                return workers;
            }
            assert!(Instant::now() < deadline, "only {} of {count} workers start", workers.len());
            sleep(POLL);
        }
    }

    /// Ends everything at once; returns what was said on the standard error.
    fn kill(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for process in marked(&self.mark) {
            process.signal(Signal::KILL);
        }
        self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Phalanx {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// All of its standard output that [`Phalanx::line`] has not seen.
    pub stdout: String,
    /// All of its standard error, and that of its workers.
    pub stderr: String,
    /// Processes that were still there when it had ended.
    pub left: Vec<Process>,
}

impl Ended {
    /// Checks that it ended well and left no process over; returns its standard output.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
        assert!(self.left.is_empty(), "left over: {:?}", self.left);
        self.stdout
    }

    /// Checks that it ended with an exit code, one clear message with all of `words` in it, and no process left over.
    #[track_caller]
    pub fn failure(self, words: &[&str]) {
        let Self { status, stdout, stderr, left } = self;
        assert!(status.code().is_some_and(|code| code != 0), "{status}, {stdout}{stderr}");
        assert!(left.is_empty(), "left over: {left:?}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        assert!(stderr.lines().count() <= 5, "more than a few lines: {stderr}");
        let messages: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let clear = messages.iter().any(|message| words.iter().all(|word| message.contains(word)));
        assert!(clear, "no message with {words:?}: {stderr}");
    }
}

/// A process that a program under test started.
#[derive(Debug, Clone)]
pub struct Process {
    pid: Pid,
    /// Its command line.
    pub args: String,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends it a signal, if it is still there.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid, signal);
    }

    /// Whether it is the first of a process group of its own.
    pub fn leads_its_group(&self) -> bool {
        getpgid(Some(self.pid)).is_ok_and(|group| group == self.pid)
    }
}

/// All processes with a mark in their environment. One that has ended, but was not waited for, has none any more.
fn marked(mark: &str) -> Vec<Process> {
    let entry = format!("{MARK}={mark}");
    let pids = fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let process = |pid: i32| {
        let folder = Path::new("/proc").join(pid.to_string());
        let environment = fs::read(folder.join("environ")).ok()?;
        environment.split(|&byte| byte == 0).find(|variable| *variable == entry.as_bytes())?;
        let args = String::from_utf8_lossy(&fs::read(folder.join("cmdline")).ok()?).replace('\0', " ");
        Some(Process { pid: Pid::from_raw(pid)?, args })
    };
    pids.filter_map(process).collect()
}
