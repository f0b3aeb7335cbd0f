//! The binary `phalanx`.

fn main() -> std::process::ExitCode {
    cli::main()
}
