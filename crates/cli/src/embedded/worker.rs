//! One worker process of an embedded cluster.
//!
//! Its standard input is a pipe from here. However this process ends, the pipe closes and the worker leaves, so none is left
//! over. Its standard output tells where it listens.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use coordinator::{Contender, State};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{sleep, timeout};
use worker::Fault;

use super::given_up::given_up;
use crate::secret::SECRET_VARIABLE;

/// How long a worker may take to leave before it is killed.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// Pauses before a worker is started again; the longer ones for workers that end soon again and again.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that ran for so long did not end by its start.
const SOON: Duration = Duration::from_secs(10);

/// A worker process.
pub(super) struct Worker {
    command: CommandLine,
    process: Process,
}

struct Process {
    child: Child,
    /// What it lives by. Kept apart, since waiting for a process closes the input that it still has.
    input: ChildStdin,
    output: ChildStdout,
}

/// How a worker is started.
pub(super) struct CommandLine {
    /// Its number among this machine's; the first draws the progress bar.
    pub(super) index: usize,
    /// Arguments about the model.
    pub(super) model: Vec<String>,
    /// Bytes that it may take.
    pub(super) memory: Option<u64>,
    pub(super) coordinator: SocketAddr,
    pub(super) secret: String,
    /// What breaks on purpose in its first process.
    pub(super) faults: Vec<Fault>,
}

impl Worker {
    /// Starts one.
    pub(super) fn start(mut command: CommandLine) -> Result<Self> {
        let process = command.spawn()?;
        Ok(Self { command, process })
    }

    /// Waits for its end, which none should have; says how it was.
    pub(super) async fn end(&mut self) -> Result<String> {
        let index = self.command.index;
        let status =
            self.process.child.wait().await.with_context(|| format!("cannot watch worker {index}"))?;
        Ok(format!("worker {index} ended ({status})"))
    }

    /// Waits until it has ended by itself, or hangs and was killed: nothing else frees what it holds. Says how it was.
    async fn end_or_kill(&mut self, coordinator: &Contender) -> Result<String> {
        let index = self.command.index;
        let Process { child, output, .. } = &mut self.process;
        tokio::select! {
            biased;
            _ = child.wait() => {}
            () = given_up(coordinator, output) => {
                child.kill().await.with_context(|| format!("cannot kill worker {index}, which hangs"))?;
                return Ok(format!("worker {index} was given up by the coordinator, is killed"));
            }
        }
        self.end().await
    }

    /// Starts it again whenever it has ended; returns when that cannot be done.
    pub(super) async fn keep_running(&mut self, coordinator: &Contender) -> Error {
        let mut state = coordinator.state();
        let mut pause = SHORTEST_PAUSE;
        loop {
            let started = Instant::now();
            match self.end_or_kill(coordinator).await {
                Ok(end) => eprintln!("{end} and is started again; what it had to say is above"),
                Err(error) => return error,
            }
            if started.elapsed() >= SOON {
                pause = SHORTEST_PAUSE;
            }
            if pause == SHORTEST_PAUSE {
                // At once if nothing goes on without it; else first things first.
                let _ = timeout(pause, state.wait_for(|state| matches!(state, State::Waiting(_)))).await;
            } else {
                sleep(pause).await;
            }
            if state.wait_for(|state| *state != State::Loading).await.is_err() {
                return anyhow!("the coordinator has stopped");
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            match self.command.spawn() {
                Ok(process) => self.process = process,
                Err(error) => return error,
            }
        }
    }

    /// Ends it.
    pub(super) async fn stop(self) -> Result<()> {
        let Process { child: mut process, input, .. } = self.process;
        drop(input);
        if timeout(LEAVE_LIMIT, process.wait()).await.is_err() {
            process.kill().await.context("cannot end a worker")?;
        }
        Ok(())
    }
}

impl CommandLine {
    fn spawn(&mut self) -> Result<Process> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(&program);
        command.args(["worker", "--leave-with-stdin", "--coordinator", &self.coordinator.to_string()]);
        command.args(["--listen", "127.0.0.1:0", "--host", "127.0.0.1"]);
        if self.index == 0 {
            command.arg("--progress");
        }
        if let Some(memory) = self.memory {
            command.args(["--memory", &memory.to_string()]);
        }
        for fault in self.faults.drain(..) {
            command.args(["--fault", &fault.to_string()]);
        }
        command.args(&self.model).env(SECRET_VARIABLE, &self.secret);
        // A group of its own: Ctrl-C in a terminal is for this process, which then ends its workers.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).kill_on_drop(true);
        let mut child =
            command.spawn().with_context(|| format!("cannot start a worker with {}", program.display()))?;
        let input = child.stdin.take().context("a worker has no standard input")?;
        let output = child.stdout.take().context("a worker has no standard output")?;
        Ok(Process { child, input, output })
    }
}
