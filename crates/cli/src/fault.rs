//! `--fault`: workers that break on purpose.

use std::str::FromStr;

use clap::Args;
use worker::Fault;

/// The faults of a worker.
#[derive(Debug, Clone, Args)]
pub(crate) struct FaultArgs {
    /// For tests and drills: BREAK THIS WORKER ON PURPOSE in the STEPth step that this process runs (kill@, stop@, panic@STEP: the process is killed, is stopped, has its executor thread panic; hang@STEP[:SECONDS]: steps stand still, heartbeats go on; slow@STEP:MILLIS: steps take longer from then on; cut@, drop@, corrupt@STEP: connections with other ranks are shut down, lose messages, flip a bit). kill, stop, panic and hang may say 'load' for STEP. May be given several times
    #[arg(long = "fault", value_name = "SPEC")]
    pub(crate) faults: Vec<Fault>,
}

impl FaultArgs {
    /// Says so, since nobody should wonder.
    pub(crate) fn warn(&self) {
        for fault in &self.faults {
            eprintln!("warning: --fault {fault}: this worker breaks on purpose");
        }
    }
}

/// A fault of one of this machine's workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkerFault {
    /// Its number.
    pub(crate) worker: usize,
    pub(crate) fault: Fault,
}

impl FromStr for WorkerFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (worker, fault) = text
            .split_once(':')
            .and_then(|(worker, fault)| Some((worker.parse().ok()?, fault)))
            .ok_or_else(|| format!("'{text}' is not WORKER:SPEC, such as 0:kill@7"))?;
        Ok(Self { worker, fault: fault.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_workers() {
        let parsed = "2:hang@7:1.5".parse::<WorkerFault>().expect("a fault");
        assert_eq!((parsed.worker, parsed.fault.to_string()), (2, "hang@7:1.5".to_owned()));
        for wrong in ["", "kill@7", "x:kill@7", "-1:kill@7", "1:", "1:burn@7"] {
            assert!(wrong.parse::<WorkerFault>().is_err(), "{wrong}");
        }
    }
}
