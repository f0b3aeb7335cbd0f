//! `protoc` as `prost-build` runs it: writes the descriptors of .proto files into a file. See README.md.

use std::error::Error;
use std::process::ExitCode;

use prost::Message;
use protox::Compiler;

#[derive(Default)]
struct Arguments {
    includes: Vec<String>,
    files: Vec<String>,
    out: Option<String>,
    imports: bool,
    source_info: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut given = std::env::args().skip(1);
    let mut arguments = Arguments::default();
    while let Some(argument) = given.next() {
        let mut value = || given.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--version" => {
                println!("libprotoc 3.21.12");
                return Ok(());
            }
            "-I" => arguments.includes.push(value()?),
            "-o" => arguments.out = Some(value()?),
            "--include_imports" => arguments.imports = true,
            "--include_source_info" => arguments.source_info = true,
            option if option.starts_with('-') => return Err(format!("{option} is not supported").into()),
            file => arguments.files.push(file.to_owned()),
        }
    }
    let out = arguments.out.ok_or("-o FILE is missing")?;
    let descriptors = Compiler::new(arguments.includes)?
        .include_imports(arguments.imports)
        .include_source_info(arguments.source_info)
        .open_files(arguments.files)?
        .file_descriptor_set();
    std::fs::write(&out, descriptors.encode_to_vec()).map_err(|error| format!("{out}: {error}"))?;
    Ok(())
}
