//! Compiles the protobuf files without a system `protoc`, and keeps their descriptors for reflection.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

const PROTO: &str = "../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let files = ["cluster", "generation", "monitor"].map(|name| format!("phalanx/v1/{name}.proto"));
    let descriptors = protox::compile(files, [PROTO])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("phalanx.v1.bin"), descriptors.encode_to_vec())?;
    let mut code = tonic_prost_build::configure().bytes(".");
    // What is shown to people is shown to programs as it is.
    let monitor = descriptors.file.iter().filter(|file| file.name().ends_with("/monitor.proto"));
    for message in monitor.flat_map(|file| &file.message_type) {
        let name = format!(".phalanx.v1.{}", message.name());
        code = code.type_attribute(name, "#[derive(serde::Serialize)]");
    }
    code.compile_fds(descriptors)?;
    Ok(())
}
