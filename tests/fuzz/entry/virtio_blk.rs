//! A disk's queue in hostile guest memory, without the thread that works on it: 4 bytes of parameters, then the bytes of RAM from
//! descriptor table to the last request.

use std::sync::{Arc, LazyLock};

use ferry::block::disk::Disk;
use ferry::device::virtio::blk::VirtioBlk;
use ferry::device::virtio::{Processed, VirtioDevice};
use ferry::memory::GuestRam;
use ferry::vm::config::DiskConfig;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::allocation::within;
use super::scratch;

/// Where the input lies: descriptor table, available ring, used ring, then whatever the descriptors point to.
pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x1100;
pub const USED: u64 = 0x1140;
/// Descriptors in the queue.
pub const QUEUE: u16 = 16;

/// A disk of 128 sectors in memory, locked; the same one for every input.
pub fn disk() -> Arc<Disk> {
    static DISK: LazyLock<Arc<Disk>> = LazyLock::new(|| {
        let (file, path) = scratch::file(&[0x5a; 65536]);
        let disk = Disk::open(DiskConfig { id: "root".into(), path, readonly: false, options: Default::default() }).expect("a disk");
        disk.acquire().expect("its lock");
        drop(file);
        disk
    });
    DISK.clone()
}

pub fn run(data: &[u8]) {
    let Some(([features, size, next, _], content)) = data.split_first_chunk::<4>() else { return };
    let ram = GuestRam::allocate(2 << 20).expect("RAM");
    let content = &content[..content.len().min(0x4000)];
    ram.memory().write_slice(content, GuestAddress(DESC)).expect("it fits");
    let device = VirtioBlk::new(disk(), |_| {});
    let io = device.open_backend().expect("the lock is there");
    let state = QueueState {
        max_size: 256,
        next_avail: u16::from(*next),
        next_used: 0,
        event_idx_enabled: features & 1 == 1,
        size: if size & 1 == 1 { 256 } else { QUEUE },
        ready: true,
        desc_table: DESC,
        avail_ring: AVAIL,
        used_ring: USED,
    };
    let Ok(mut queue) = Queue::try_from(state) else { return };
    let features = if features & 2 == 2 { device.features() } else { 1 << 32 };
    for _ in 0..QUEUE {
        let Ok(mut chains) = queue.iter(ram.memory()) else { return };
        let Some(chain) = chains.next() else { return };
        let head = chain.head_index();
        // Descriptors point to RAM, which nobody copies: 256 slices are all there is to allocate.
        let Ok(Processed::Done(written)) = within(1 << 16, || device.process(&io, features, ram.memory(), chain)) else { return };
        if queue.add_used(ram.memory(), head, written).is_err() {
            return;
        }
    }
}
