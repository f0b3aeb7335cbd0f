//! `phalanx kernels compile`.

use std::io::{self, Write};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use kernels::cuda::{Arch, KernelUsage, Module, Nvrtc, Origin, SOURCES, Store, load, violations};
use serde_json::{Value, json};

use super::CompileArgs;

impl CompileArgs {
    pub(super) fn run(self) -> Result<()> {
        let archs: Vec<Arch> = self.arch.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
        let nvrtc = Nvrtc::open()?;
        let store = self.out.clone().map_or_else(Store::cache, Store::folder);
        let style = ProgressStyle::with_template("compiling {wide_bar} {pos}/{len} {msg}")?;
        let bar = ProgressBar::new((archs.len() * SOURCES.len()) as u64).with_style(style);
        let mut modules = Vec::new();
        let mut warning = None;
        for arch in archs {
            let loaded = load(&store, arch, &|module| {
                bar.set_message(format!("{} {}", module.source, module.arch));
                bar.inc(1);
            })?;
            if loaded.modules.iter().any(|module| module.arch != arch) {
                bail!(
                    "NVRTC {} does not know {arch}: leave it out of --arch, or take a later CUDA",
                    nvrtc.version()
                );
            }
            warning = warning.or(loaded.warning);
            modules.extend(loaded.modules);
        }
        bar.finish_and_clear();
        match warning {
            Some(warning) if self.out.is_some() => bail!("--out: {warning}"),
            Some(warning) => eprintln!("warning: {warning}"),
            None => {}
        }
        if self.json {
            let kernels: Vec<Value> = modules.iter().flat_map(module_json).collect();
            let nvrtc = nvrtc.version().to_string();
            println!("{}", serde_json::to_string_pretty(&json!({ "nvrtc": nvrtc, "kernels": kernels }))?);
        } else {
            print_table(&modules)?;
            let compiled = modules.iter().filter(|module| module.origin == Origin::Compiled).count();
            println!("{} modules, {compiled} compiled now, NVRTC {}", modules.len(), nvrtc.version());
        }
        if self.check { check(&modules) } else { Ok(()) }
    }
}

fn check(modules: &[Module]) -> Result<()> {
    let found: Vec<String> = modules
        .chunk_by(|a, b| a.arch == b.arch)
        .filter(|modules| !modules[0].arch.is_ptx())
        .flat_map(|modules| violations(&modules.iter().flat_map(Module::usage).collect::<Vec<_>>()))
        .collect();
    if !found.is_empty() {
        bail!("kernels are not within their limits:\n{}", found.join("\n"));
    }
    Ok(())
}

fn module_json(module: &Module) -> Vec<Value> {
    let describe = |usage: KernelUsage| {
        json!({
            "kernel": usage.kernel,
            "file": module.source,
            "arch": module.arch.name(),
            "registers": usage.registers,
            "spill_stores": usage.spill_stores,
            "spill_loads": usage.spill_loads,
            "stack": usage.stack,
            "shared": usage.shared,
            "barriers": usage.barriers,
        })
    };
    module.usage().into_iter().map(describe).collect()
}

/// One line for each kernel and architecture; sizes are bytes.
fn print_table(modules: &[Module]) -> io::Result<()> {
    let mut lines: Vec<[String; 8]> = vec![
        ["kernel", "arch", "registers", "spill stores", "spill loads", "stack", "shared", "barriers"]
            .map(str::to_owned),
    ];
    for module in modules {
        for usage in module.usage() {
            let figures = [
                usage.registers,
                usage.spill_stores,
                usage.spill_loads,
                usage.stack,
                usage.shared,
                usage.barriers,
            ];
            let [a, b, c, d, e, f] = figures.map(|figure| figure.to_string());
            lines.push([usage.kernel, usage.arch, a, b, c, d, e, f]);
        }
    }
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut out = io::stdout().lock();
    for line in &lines {
        write!(out, "{:<1$}  {2:<3$}", line[0], widths[0], line[1], widths[1])?;
        for column in 2..line.len() {
            write!(out, "  {:>1$}", line[column], widths[column])?;
        }
        writeln!(out)?;
    }
    Ok(())
}
