//! What a migration leaves behind in the scheduler: nothing.

use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};

/// Nanoseconds of a thread's slice (`sched_runtime` of sched_getattr(2)); 0 before Linux 6.12, which has none of its own for a thread.
fn slice(thread: i32) -> u64 {
    // Up to `sched_runtime`: size and policy, flags, nice value and priority, and so on.
    let mut attributes = [0u64; 6];
    // SAFETY: the kernel writes no more than the size that it is told.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, thread, attributes.as_mut_ptr(), size_of_val(&attributes), 0) };
    assert_eq!(known, 0, "{}", std::io::Error::last_os_error());
    attributes[3]
}

/// The slices of a process's threads, by name.
fn slices(process: u32) -> Vec<(String, u64)> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap());
    let named = |task: std::fs::DirEntry| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?.trim().to_owned();
        Some((name, slice(task.file_name().to_str()?.parse().ok()?)))
    };
    tasks.filter_map(named).collect()
}

#[test]
fn the_threads_of_a_guest_that_has_come_are_like_any_others() {
    let lab = Lab::new();
    let disk = lab.disk(16 << 20);
    let hardware = Hardware { memory: "64M", cpus: 2, disk: Some(&disk), ..Hardware::default() };
    let mut here = lab.run(&hardware, "cpus=2 fill=32M disk=on");
    let mut guest = Guest::booting_at(&mut here);
    guest.beats(1);
    for mode in ["precopy", "postcopy"] {
        let mut there = lab.receive(Transport::Unix);
        lab.migrate(&here, &there.address, &["--mode", mode]).succeeds();
        guest.moved_to(&mut there);
        guest.beats(1);
        let of_guest: Vec<_> = slices(there.process.id()).into_iter().filter(|(name, _)| !name.starts_with("migration")).collect();
        assert_eq!(of_guest.iter().filter(|(name, _)| name.starts_with("vcpu")).count(), 2, "{of_guest:?}");
        let ordinary = slice(0);
        assert!(of_guest.iter().all(|(_, slice)| *slice == ordinary), "{mode}: {ordinary} is ordinary, not {of_guest:?}");
        here = there;
    }
}
