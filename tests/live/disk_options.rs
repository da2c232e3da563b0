//! Disks past the host's page cache, and disks that ignore discards.

use std::os::unix::fs::MetadataExt;

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

#[test]
fn a_disk_with_direct_io_that_ignores_discards_moves_with_its_options() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    // Nothing of it is a hole, and with discard=ignore nothing becomes one.
    std::fs::write(&disk.path, vec![0x5a; 16 << 20]).unwrap();
    let blocks = || std::fs::metadata(&disk.path).unwrap().blocks();
    let before = blocks();
    let argument = format!("path={},id=root,cache=none,discard=ignore,rerror=stop,werror=report", disk.path.display());
    let hardware = Hardware { memory: "128M", cpus: 2, ..Hardware::default() };
    let cmdline = "fill=16M rate=1000 disk=on disk_rate=1000 disk_discard=on run=6";
    let mut here = lab.run_with(super::pagestorm_kernel::path(), &hardware, cmdline, &["--disk", &argument]);
    let mut guest = Guest::booting_at(&mut here);
    guest.writes_blocks(300);
    for mode in ["precopy", "postcopy"] {
        let mut there = lab.receive(Transport::Unix);
        lab.migrate(&here, &there.address, &["--mode", mode, "--downtime", "1s"]).succeeds();
        here.ends_with(0);
        guest.moved_to(&mut there);
        let mut fds = std::fs::read_dir(format!("/proc/{}/fd", there.process.id())).unwrap().map(|entry| entry.unwrap());
        let image = fds.find(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == disk.path)).unwrap();
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", there.process.id(), image.file_name().display())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        assert_ne!(u32::from_str_radix(flags, 8).unwrap() & libc::O_DIRECT as u32, 0, "{info}");
        guest.writes_blocks(300);
        here = there;
    }
    guest.finishes();
    here.ends_with(0);
    // The file system may take more for its own account of what is zero.
    assert!(blocks() >= before, "{} of {before}", blocks());
    // The guest has read back all that it knows; what it discarded is still there.
    let (count, _) = disk.snapshot().check(guest.fact("disk", "magic"));
    assert!(count > guest.fact("disk", "data_blocks"), "{count}");
}
