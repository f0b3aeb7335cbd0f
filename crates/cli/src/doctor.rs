//! `phalanx doctor`: whether workers, and what lies between them, are fit to serve; and who is to blame if not.

mod report;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget};

use crate::operate::OperatorArgs;

/// From one picture of the spinner to the next.
const SPIN: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Measure how much links carry even though a group works, which holds it up for some seconds
    #[arg(long)]
    bandwidth: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl DoctorArgs {
    /// Fails if there are complaints.
    pub(crate) async fn run(self) -> Result<()> {
        let secret = self.operator.secret.secret()?;
        let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if std::io::stderr().is_terminal() {
            spinner.set_message("examining the workers, which takes up to ten seconds");
            spinner.enable_steady_tick(SPIN);
        }
        let report = client::examine(&self.operator.coordinator, &secret, self.bandwidth).await;
        spinner.finish_and_clear();
        let report = report?;
        let text = if self.json { format!("{}\n", report::json(&report)) } else { report::text(&report) };
        std::io::stdout().lock().write_all(text.as_bytes())?;
        match report.complaints.len() {
            0 => Ok(()),
            1 => bail!("there is 1 complaint"),
            count => bail!("there are {count} complaints"),
        }
    }
}
