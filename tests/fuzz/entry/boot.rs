//! Kernel files. The first byte chooses the size of the guest's RAM, and whether there is an initrd.

use ferry::memory::GuestRam;
use ferry::vm::config::GuestConfig;

use super::allocation::within;
use super::scratch;

pub fn run(data: &[u8]) {
    let Some((&choice, kernel)) = data.split_first() else { return };
    let memory = [2 << 20, 32 << 20][usize::from(choice & 1)];
    let ram = GuestRam::allocate(memory).expect("RAM");
    let (_kernel, path) = scratch::file(kernel);
    let (_initrd, initrd) = scratch::file(&[7; 5000]);
    let initrd = (choice & 2 != 0).then_some(initrd);
    let cmdline = "console=ttyS0".into();
    let config = GuestConfig {
        name: "guest".into(),
        cpus: 2,
        memory,
        lock_memory: false,
        hugepages: false,
        kernel: path,
        initrd,
        cmdline,
        disks: Vec::new(),
    };
    let loaded = within(1 << 20, || ferry::boot::load(&config, &ram, &[0, 1]));
    if let Err(error) = loaded {
        assert!(!error.to_string().is_empty());
    }
}
