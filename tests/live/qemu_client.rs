//! QEMU's own client, qemu.qmp from PyPI, against a live guest that it moves. `FERRY_QMP_PYTHON` names the Python that has it.

use std::process::Command;

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

#[test]
fn qemu_s_own_client_moves_a_guest() {
    let python = std::env::var_os("FERRY_QMP_PYTHON").expect("FERRY_QMP_PYTHON must name a Python with the package qemu.qmp");
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let hardware = Hardware { memory: "256M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "fill=32M rate=5000 disk=on");
    let mut guest = Guest::booting_at(&mut here);
    guest.checks_every_page();
    let mut there = lab.receive(Transport::Unix);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp/qemu_client.py");
    let client = |arguments: &[&str]| {
        let output = Command::new(&python).arg(script).args(["--disk", "root"]).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
    };
    client(&[here.qmp.to_str().unwrap(), "--migrate-to", &there.address]);
    here.ends_with(0);
    guest.moved_to(&mut there);
    guest.checks_every_page();
    client(&[there.qmp.to_str().unwrap(), "--quit"]);
    there.ends_with(0);
}
