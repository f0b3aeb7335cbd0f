//! How faults are written, and when they are due.

use super::*;

#[test]
fn faults_are_said_as_they_are_read() {
    for text in [
        "kill@1",
        "kill@load",
        "hang@7",
        "hang@7:2.5",
        "hang@load",
        "stop@3",
        "stop@load",
        "slow@4:250",
        "cut@5",
        "drop@6",
        "corrupt@18446744073709551615",
        "panic@8",
        "panic@load",
    ] {
        assert_eq!(text.parse::<Fault>().map(|fault| fault.to_string()), Ok(text.to_owned()));
    }
}

#[test]
fn what_is_no_fault_is_told_what_is() {
    for text in [
        "",
        "kill",
        "kill@",
        "kill@0",
        "kill@-1",
        "kill@x",
        "kill@1:2",
        "hang@1:",
        "hang@1:x",
        "hang@1:-1",
        "hang@1:inf",
        "hang@1:1e7",
        "stop@1:1",
        "slow@1",
        "slow@1:",
        "slow@1:1.5",
        "slow@1:1000000001",
        "slow@load:1",
        "cut@load",
        "drop@load",
        "corrupt@load",
        "burn@1",
        "kill@18446744073709551616",
        "kill@1@1",
    ] {
        let error = text.parse::<Fault>().expect_err(text);
        assert!(error.contains("kill@STEP") && error.contains("slow@STEP:MILLIS"), "{error}");
    }
}

#[test]
fn without_faults_there_is_nothing_to_ask() {
    assert!(Faults::new(&[]).is_none());
    let fault = |text: &str| text.parse::<Fault>().expect("a fault");
    assert!(Faults::new(&[fault("kill@1")]).expect("faults").wires().is_none());
    assert!(Faults::new(&[fault("kill@1"), fault("drop@2")]).expect("faults").wires().is_some());
}
