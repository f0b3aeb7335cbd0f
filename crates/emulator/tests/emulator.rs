//! The emulator's own tests: they are C++ programs, run here in each order of threads.

use std::path::PathBuf;
use std::process::{Command, Output};

const ORDERS: [&str; 3] = ["forward", "reverse", "shuffled"];

/// The test program, or nothing (and a sentence) where there is no compiler.
fn program(name: &str) -> Option<PathBuf> {
    let main = format!("tests/{name}/main.cpp");
    match emulator::program(name, &[&main, "tests/simt/kernels.cu"]) {
        Ok(program) => Some(program),
        Err(absent) => {
            eprintln!("skipped: {absent}");
            None
        }
    }
}

fn run(program: &PathBuf, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).env_remove("PHALANX_EMULATOR_ORDER").envs(variables.iter().copied());
    command.output().expect("the program runs")
}

fn expect_success(output: &Output, what: &str) {
    let words = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && words.contains("fine"), "{what}: {words}{errors}");
}

#[test]
fn threads_meet_as_on_a_gpu() {
    let Some(program) = program("simt") else { return };
    for order in ORDERS {
        let output = run(&program, &[], &[("PHALANX_EMULATOR_ORDER", order)]);
        expect_success(&output, order);
    }
    expect_success(&run(&program, &[], &[]), "by chance");
}

#[test]
fn mistakes_end_the_process_with_a_sentence() {
    let Some(program) = program("simt") else { return };
    let mistakes = [
        ("wrong_divergence", "but other threads of the block are at"),
        ("wrong_deadlock", "every thread waits for another one"),
        ("wrong_alignment", "not a multiple of 16"),
        ("wrong_address", "signal 11"),
        ("wrong_index", "signal 4"),
        ("wrong_sum", "signal 4"),
        ("wrong_shared_overrun", "outside the block's dynamic shared memory"),
        ("wrong_stack", "the thread's stack is full"),
    ];
    for order in ORDERS {
        for (kernel, words) in mistakes {
            let output = run(&program, &[kernel], &[("PHALANX_EMULATOR_ORDER", order)]);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{kernel} went unnoticed");
            assert!(errors.contains(words) && errors.contains(kernel), "{kernel}, {order}: {errors}");
        }
    }
}

#[test]
fn the_driver_answers_as_a_real_one() {
    let Some(program) = program("driver") else { return };
    for (late, beside) in [("0", "0"), ("1", "0"), ("0", "1")] {
        let variables = [
            ("PHALANX_EMULATOR_LATE", late),
            ("PHALANX_EMULATOR_BESIDE", beside),
            ("PHALANX_EMULATOR_DEVICES", "2"),
            ("PHALANX_EMULATOR_MEMORY", "1073741824"),
        ];
        expect_success(&run(&program, &[], &variables), &format!("late {late}, beside {beside}"));
    }
}

#[test]
fn kernels_do_not_write_behind_an_allocation() {
    let Some(program) = program("driver") else { return };
    let output = run(&program, &["overrun"], &[("PHALANX_EMULATOR_DEVICES", "2")]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let words = "kernel wrong_address, block (0, 0, 0), thread (5, 0, 0): signal 11";
    assert!(!output.status.success() && errors.contains(words), "{errors}");
    assert!(errors.contains("byte 4096 of an allocation of 4000"), "{errors}");
}

#[test]
fn the_libraries_can_be_opened() {
    let Some(program) = program("load") else { return };
    let folder = emulator::libraries().expect("there is a compiler");
    let output = run(&program, &[folder.to_str().expect("a plain path")], &[]);
    expect_success(&output, "load");
}
