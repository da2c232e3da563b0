//! QEMU's own client, qemu.qmp from PyPI, against the server. `FERRY_QMP_PYTHON` names the Python that has it.

use std::process::Command;

use crate::recorder::Fixture;

#[test]
fn qemu_s_own_client_drives_the_server() {
    let python = std::env::var_os("FERRY_QMP_PYTHON").expect("FERRY_QMP_PYTHON must name a Python with the package qemu.qmp");
    let fixture = Fixture::start();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp/qemu_client.py");
    let arguments = ["--two-more", "d1", "small", "--migrate-to", "tcp:127.0.0.1:1", "--quit"];
    let output = Command::new(python).arg(script).arg(&fixture.path).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(fixture.has_quit(), "{text}");
}
