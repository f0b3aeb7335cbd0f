//! `phalanx` itself, built in this package so that its tests get the path of a fresh build.

fn main() -> std::process::ExitCode {
    cli::main()
}
