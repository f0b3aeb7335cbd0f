//! `phalanx chat`: a conversation in the terminal, with the model's own chat template.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Result, bail};
use clap::Args;
use client::{ChatMessage, Client, Conversation, Event, Prompt};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::generate::tell_change;
use crate::sampling::SamplingArgs;
use crate::target::TargetArgs;

/// Answers to a person are drawn with some variety, unless --temperature says otherwise.
const TEMPERATURE: f32 = 0.6;

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

impl ChatArgs {
    pub(crate) async fn run(mut self) -> Result<()> {
        self.sampling.temperature.get_or_insert(TEMPERATURE);
        let (sampling, system) = (self.sampling, self.system);
        self.target.with_client(async |client| converse(&client, &sampling, system).await).await
    }
}

async fn converse(client: &Client, sampling: &SamplingArgs, system: Option<String>) -> Result<()> {
    let model = client.model().await?;
    if !model.has_chat_template {
        bail!("{} has no chat template: use `phalanx generate`", model.name);
    }
    let message = |role: &str, content: String| ChatMessage { role: role.into(), content };
    let mut messages: Vec<_> = system.map(|text| message("system", text)).into_iter().collect();
    let person = std::io::stdin().is_terminal();
    if person {
        println!("{}, {} ranks. An empty line or Ctrl-D ends the conversation.", model.name, model.ranks);
    }
    let mut lines = lines();
    loop {
        if person {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let Some(line) = lines.recv().await.filter(|line| !line.trim().is_empty()) else { return Ok(()) };
        messages.push(message("user", line));
        let prompt = Prompt::Conversation(Conversation { messages: messages.clone() });
        let text = answer(client, sampling, prompt).await?;
        messages.push(message("assistant", text));
    }
}

/// Prints an answer as it comes, and returns it.
async fn answer(client: &Client, sampling: &SamplingArgs, prompt: Prompt) -> Result<String> {
    let mut text = String::new();
    let mut stream = client.generate(sampling.request(prompt)).await?;
    while let Some(event) = stream.next().await {
        let piece = match event? {
            Event::Started(started) => {
                tell_change(&started);
                continue;
            }
            Event::Token(token) => token.text,
            Event::Finished(finished) => finished.text + "\n",
        };
        print!("{piece}");
        std::io::stdout().flush()?;
        text.push_str(&piece);
    }
    text.truncate(text.trim_end().len());
    Ok(text)
}

/// The lines of the standard input, read on a thread of their own: a read cannot be given up.
fn lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
