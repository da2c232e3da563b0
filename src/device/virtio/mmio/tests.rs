// One range, not the numbers in it, is what is meant.
#![allow(clippy::single_range_in_vec_init)]

use std::os::unix::fs::FileExt;

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_mmio::*;
use vm_memory::Bytes;

use super::super::blk::VirtioBlk;
use super::super::test_driver::*;
use super::*;
use crate::block::dirty_bitmap::Granularity;
use crate::block::disk::Disk;
use crate::memory::uffd::Userfaultfd;
use crate::memory::{PAGE_SIZE, PageRun};

const SIZE: u64 = 4 << 20;
const NEEDS_RESET_STATUS: u32 = 64;

fn image(disk: &Disk) -> std::fs::File {
    std::fs::File::open(&disk.config().path).unwrap()
}

/// Waits for what the device does without an interrupt, or with one that the test wants to see itself.
fn wait_without_interrupt(condition: impl Fn() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !condition() {
        assert!(std::time::Instant::now() < end, "the device does nothing");
        std::thread::yield_now();
    }
}

#[test]
fn the_registers_describe_a_modern_block_device() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let driver = TestDriver::running(disk);
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), !0);
    // Capacity, seg_max, blk_size, max_discard_seg.
    assert_eq!([driver.config(0, 8), driver.config(12, 4), driver.config(20, 4), driver.config(40, 4)], [SIZE / 512, 254, 512, 32]);
    // Beyond the configuration space, and a register read with the wrong width.
    assert_eq!(driver.config(0x800, 8), 0);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn features_must_be_offered_and_modern() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let driver = TestDriver::running(disk);
    for (features, accepted) in [(VERSION_1, true), (0, false), (VERSION_1 | 1 << 5, false), (VERSION_1 | EVENT_IDX, true)] {
        driver.write(VIRTIO_MMIO_STATUS, 0);
        driver.negotiate(features);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), if accepted { 11 } else { 3 }, "{features:#x}");
    }
    // DRIVER_OK before FEATURES_OK has no effect, and bits go away only by a reset.
    driver.write(VIRTIO_MMIO_STATUS, 0);
    driver.write(VIRTIO_MMIO_STATUS, 4);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    driver.write(VIRTIO_MMIO_STATUS, 1);
    driver.write(VIRTIO_MMIO_STATUS, 2);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3);
}

#[test]
fn what_is_written_is_read_back_and_in_the_bitmap() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    disk.bitmaps().add("b", Granularity::new(4096).unwrap(), true).unwrap();
    let mut driver = TestDriver::running(disk.clone());
    let pattern: Vec<u8> = (0..8192).map(|index| (index % 251) as u8).collect();
    driver.ram.memory().write_slice(&pattern, GuestAddress(DATA)).unwrap();
    assert_eq!(driver.request(OUT, 9, Some((DATA, 8192, 0))), (0, 1));
    assert_eq!(disk.bitmaps().dirty_ranges("b").unwrap(), [4096..16384]);
    let mut on_disk = vec![0; 8192];
    image(&disk).read_exact_at(&mut on_disk, 9 * 512).unwrap();
    assert_eq!(on_disk, pattern);
    assert_eq!(driver.request(FLUSH, 0, None), (0, 1));

    // Read into two buffers that begin and end within pages: exactly their pages are dirty, beside status and used ring.
    driver.dirty();
    let (header, status) = driver.header(0, IN, 9);
    let used = driver.run(&[header, (DATA + 0x10_0200, 512, WRITE), (DATA + 0x10_1ffe, 7680, WRITE), status]);
    assert_eq!((driver.status(0), used), (0, 8193));
    let mut back = driver.bytes(DATA + 0x10_0200, 512);
    back.extend(driver.bytes(DATA + 0x10_1ffe, 7680));
    assert_eq!(back, pattern);
    let page = |address: u64| address / 4096;
    // The header was put there by the test through the same bitmap, on the status' page.
    let first = page(DATA + 0x10_0000);
    let mut expected = vec![page(DESC), page(AVAIL), page(USED), page(REQUESTS), first, first + 1, first + 2, first + 3];
    expected.sort_unstable();
    assert_eq!(driver.dirty(), expected);
}

#[test]
fn a_pause_gives_up_on_a_request_that_waits_for_a_page_and_the_device_works_on() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    // Touches all that is touched below, the pages of the data excepted.
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))).0, 0);
    let pages = Userfaultfd::open().unwrap().register(driver.ram.clone()).unwrap();
    let missing = PageRun::new(DATA / PAGE_SIZE as u64, 1);
    pages.discard(missing).unwrap();
    let (header, status) = driver.header(0, IN, 0);
    driver.put_chain(DESC, 0, &[header, (DATA, 512, WRITE), status]);
    driver.offer(0);
    driver.notify();
    let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    assert_eq!(pages.next_fault(&never).unwrap().map(|fault| fault.page), Some(missing.first));
    // Twice, as a machine does that cannot be paused goes on and is asked again.
    for _ in 0..2 {
        let error = driver.device.pause().unwrap_err().to_string();
        assert!(error.contains("virtio-blk:root") && error.contains("a request has not ended for"), "{error}");
        driver.device.resume().unwrap();
    }
    pages.place_zero(missing).unwrap();
    driver.used += 1;
    wait_without_interrupt(|| driver.used_index() == driver.used);
    assert_eq!(driver.status(0), 0);
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
    driver.device.pause().unwrap();
}

#[test]
fn discard_and_write_zeroes_change_the_image_and_the_bitmap() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk.clone());
    driver.ram.memory().write_slice(&[0xaa; 65536], GuestAddress(DATA)).unwrap();
    assert_eq!(driver.request(OUT, 0, Some((DATA, 65536, 0))).0, 0);
    disk.bitmaps().add("b", Granularity::new(4096).unwrap(), true).unwrap();
    for (kind, sector, flags) in [(DISCARD, 8u64, 0u64), (WRITE_ZEROES, 24, 0), (WRITE_ZEROES, 40, 1)] {
        driver.put(DATA + 0x2_0000, [sector, 8 | flags << 32]);
        assert_eq!(driver.request(kind, 0, Some((DATA + 0x2_0000, 16, 0))), (0, 1));
    }
    let ranges = [4096..8192, 12288..16384, 20480..24576];
    assert_eq!(disk.bitmaps().dirty_ranges("b").unwrap(), ranges);
    let mut on_disk = vec![0; 65536];
    image(&disk).read_exact_at(&mut on_disk, 0).unwrap();
    for (offset, byte) in on_disk.iter().enumerate() {
        let zeroed = ranges.iter().any(|range| range.contains(&(offset as u64)));
        assert_eq!(*byte, if zeroed { 0 } else { 0xaa }, "{offset}");
    }
    // Bad ranges and flags change nothing.
    for (kind, sector, sectors, flags, status) in [
        (DISCARD, 0, 1, 1, 2),
        (WRITE_ZEROES, 0, 1, 2, 2),
        (DISCARD, SIZE / 512, 1, 0, 1),
        (DISCARD, !0, 1, 0, 1),
        (WRITE_ZEROES, 0, 1 << 18, 0, 1),
    ] {
        driver.put(DATA + 0x2_0000, [sector, sectors | flags << 32]);
        assert_eq!(driver.request(kind, 0, Some((DATA + 0x2_0000, 16, 0))).0, status);
    }
    assert_eq!(driver.request(DISCARD, 0, Some((DATA, 17, 0))).0, 1);
    assert_eq!(driver.request(DISCARD, 0, Some((DATA, 33 * 16, 0))).0, 1);
    assert_eq!(disk.bitmaps().dirty_ranges("b").unwrap(), ranges);
}

#[test]
fn requests_that_lie_get_an_error_status() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    for (kind, sector, data, status) in [
        // Beyond the end, overflowing, not whole sectors, outside RAM, unknown.
        (IN, SIZE / 512, (DATA, 512, WRITE), 1),
        (OUT, !0, (DATA, 512, 0), 1),
        (IN, 0, (DATA, 511, WRITE), 1),
        (IN, 0, (0x1_0000_0000, 512, WRITE), 1),
        (IN, 0, ((8 << 20) - 512, 1024, WRITE), 1),
        (OUT, 0, (u64::MAX - 100, 512, 0), 1),
        (77, 0, (DATA, 512, WRITE), 2),
    ] {
        assert_eq!(driver.request(kind, sector, Some(data)).0, status, "{kind} {sector} {data:x?}");
    }
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
    // Header cut in two, status in the data's descriptor: as good as any other layout.
    let (header, _) = driver.header(0, IN, 0);
    assert_eq!(driver.run(&[(header.0, 5, 0), (header.0 + 5, 11, 0), (DATA, 513, WRITE)]), 513);
    assert_eq!(driver.get::<u8>(DATA + 512), 0);
    // A header that is too short.
    let (header, status) = driver.header(0, IN, 0);
    driver.run(&[(header.0, 15, 0), status]);
    assert_eq!(driver.status(0), 1);
    // Something to read after something to write.
    let (header, status) = driver.header(0, IN, 0);
    driver.run(&[(DATA, 512, WRITE), header, status]);
    assert_eq!(driver.status(0), 1);
}

#[test]
fn the_disk_tells_its_name_padded_with_zeros() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    driver.put(DATA, [0xffu8; 24]);
    assert_eq!(driver.request(GET_ID, 0, Some((DATA, 20, WRITE))), (0, 21));
    assert_eq!(driver.bytes(DATA, 21), b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
    assert_eq!(driver.request(GET_ID, 0, Some((DATA, 2, WRITE))), (0, 3));
}

#[test]
fn a_readonly_disk_refuses_every_change() {
    let (_directory, disk) = scratch_disk(SIZE, true);
    let mut driver = TestDriver::running(disk);
    assert_eq!(driver.features() >> 5 & 1, 1);
    assert_eq!(driver.features() >> 13 & 3, 0);
    assert_eq!(driver.request(OUT, 0, Some((DATA, 512, 0))).0, 1);
    driver.put(DATA, [0u64, 8]);
    assert_eq!(driver.request(DISCARD, 0, Some((DATA, 16, 0))).0, 2);
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
    assert_eq!(driver.request(FLUSH, 0, None).0, 0);
}

#[test]
fn indirect_descriptors_work() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    let (header, status) = driver.header(0, IN, 0);
    let data: Vec<Piece> = (0..200).map(|index| (DATA + 0x1000 * index, 512, WRITE)).collect();
    let pieces: Vec<Piece> = [header].into_iter().chain(data).chain([status]).collect();
    driver.put_chain(0x2_0000, 0, &pieces);
    assert_eq!(driver.run(&[(0x2_0000, 16 * pieces.len() as u32, INDIRECT)]), 200 * 512 + 1);
    assert_eq!(driver.status(0), 0);
}

/// Offers the chain at descriptor 0, lets `make` write it or spoil the ring, and expects that the device gives up.
fn breaks(make: impl FnOnce(&TestDriver)) {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    driver.offer(0);
    make(&driver);
    driver.notify();
    driver.wait_until(|driver| driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET_STATUS != 0);
    // It does nothing more, also after a move, until it is reset.
    driver.device.pause().unwrap();
    let state = driver.device.save().unwrap();
    driver.device.restore(&state).unwrap();
    driver.device.resume().unwrap();
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET_STATUS);
    let features = driver.features();
    driver.set_up(features);
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    // No writable byte; a status outside RAM; a loop; a next that is out of bounds; an indirect table within another, one of odd length,
    // one with too many descriptors.
    breaks(|driver| driver.put_chain(DESC, 0, &[(REQUESTS, 16, 0)]));
    breaks(|driver| driver.put_chain(DESC, 0, &[(REQUESTS, 16, 0), (1 << 40, 1, WRITE)]));
    breaks(|driver| driver.put_descriptor(DESC, 0, (REQUESTS, 16, 0), Some(0)));
    breaks(|driver| driver.put_descriptor(DESC, 0, (REQUESTS, 16, 0), Some(16)));
    breaks(|driver| {
        driver.put_chain(DESC, 0, &[(0x2_0000, 16, INDIRECT)]);
        driver.put_chain(0x2_0000, 0, &[(0x2_0000, 16, INDIRECT)]);
    });
    breaks(|driver| driver.put_chain(DESC, 0, &[(0x2_0000, 17, INDIRECT)]));
    breaks(|driver| {
        let pieces = vec![(DATA, 1, WRITE); 300];
        driver.put_chain(0x2_0000, 0, &pieces);
        driver.put_chain(DESC, 0, &[(0x2_0000, 16 * 300, INDIRECT)]);
    });
    // A head that is no descriptor, and more buffers available than the queue has.
    breaks(|driver| driver.put(AVAIL + 4, 99u16));
    breaks(|driver| driver.put(AVAIL + 2, 1000u16));
}

#[test]
fn a_queue_that_is_not_in_ram_asks_for_a_reset() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_DESC_HIGH, 1),
        (VIRTIO_MMIO_QUEUE_USED_HIGH, !0),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x4001),
        (VIRTIO_MMIO_QUEUE_NUM, 512),
        (VIRTIO_MMIO_QUEUE_NUM, 0),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0010),
    ] {
        driver.write(VIRTIO_MMIO_STATUS, 0);
        driver.negotiate(VERSION_1);
        driver.set_up_queue();
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        driver.write(register, value);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
        driver.write(VIRTIO_MMIO_STATUS, 15);
        driver.notify();
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET_STATUS);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    }
    driver.set_up(VERSION_1);
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
}

#[test]
fn a_batch_is_one_interrupt_with_event_idx() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    driver.device.pause().unwrap();
    for slot in 0..5 {
        let (header, status) = driver.header(slot, IN, slot);
        driver.put_chain(DESC, 3 * slot as u16, &[header, (DATA + 512 * slot, 512, WRITE), status]);
        driver.offer(3 * slot as u16);
    }
    // Interrupt when the third is used.
    driver.put(AVAIL + 4 + 32, 2u16);
    driver.notify();
    driver.device.resume().unwrap();
    // avail_event asks to be notified of the sixth: the device is through with its batch and will sleep.
    wait_without_interrupt(|| driver.get::<u16>(USED + 4 + 128) == 5);
    assert_eq!(driver.used_index(), 5);
    assert!((0..5).all(|slot| driver.status(slot) == 0));
    driver.device.pause().unwrap();
    assert_eq!(driver.device.interrupt_event().read().unwrap(), 1);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    // An event far away keeps the interrupt off.
    driver.put(AVAIL + 4 + 32, 100u16);
    let (header, status) = driver.header(0, FLUSH, 0);
    driver.put_chain(DESC, 0, &[header, status]);
    driver.offer(0);
    driver.device.resume().unwrap();
    wait_without_interrupt(|| driver.used_index() == 6);
    driver.device.pause().unwrap();
    assert!(driver.device.interrupt_event().read().is_err());
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_reset_at_any_time_ends_the_work_before_it_returns() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    let features = driver.features();
    for round in 0..50 {
        for slot in 0..5 {
            let (header, status) = driver.header(slot, IN, 0);
            driver.put_chain(DESC, 3 * slot as u16, &[header, (DATA, 1 << 20, WRITE), status]);
            driver.offer(3 * slot as u16);
        }
        driver.notify();
        if round % 2 == 0 {
            driver.write(VIRTIO_MMIO_STATUS, 0);
        } else {
            driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        }
        let used = driver.used_index();
        driver.ram.memory().write_slice(&[0x55; 4096], GuestAddress(DATA)).unwrap();
        driver.notify();
        driver.device.pause().unwrap();
        assert_eq!(driver.used_index(), used);
        assert_eq!(driver.bytes(DATA, 4096), [0x55; 4096]);
        driver.device.resume().unwrap();
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        driver.set_up(features);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
    assert_eq!(driver.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
}

#[test]
fn the_device_moves_with_requests_waiting() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut source = TestDriver::running(disk.clone());
    source.ram.memory().write_slice(&[0x77; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(source.request(OUT, 3, Some((DATA, 512, 0))).0, 0);
    // One completion whose interrupt nobody acknowledges, and one request that arrives while paused.
    source.put(AVAIL + 4 + 32, source.used);
    let (header, status) = source.header(1, FLUSH, 0);
    source.put_chain(DESC, 4, &[header, status]);
    source.offer(4);
    source.notify();
    wait_without_interrupt(|| source.read(VIRTIO_MMIO_INTERRUPT_STATUS) != 0);
    source.device.pause().unwrap();
    let (header, status) = source.header(2, IN, 3);
    source.put_chain(DESC, 6, &[header, (DATA + 0x1000, 512, WRITE), status]);
    source.put(AVAIL + 4 + 32, 2u16);
    source.offer(6);
    source.notify();

    // Another process would have its own open of the image.
    let there = Disk::open(disk.config().clone()).unwrap();
    let mut target = TestDriver::paused(there.clone(), source.ram.clone());
    (target.avail, target.used) = (source.avail, source.used + 1);
    let state = source.device.save().unwrap();
    target.device.restore(&state).unwrap();
    assert_eq!(target.device.save().unwrap(), state);
    // Not before the source gave the image up.
    let refused = there.acquire().unwrap_err().to_string();
    assert!(refused.contains("disk.img is in use by another runner"), "{refused}");
    assert!(target.device.resume().unwrap_err().to_string().contains("not locked"));
    disk.release().unwrap();
    assert!(source.device.resume().is_err());
    there.acquire().unwrap();
    target.device.resume().unwrap();
    // The first look at the event is for the interrupt that was not acknowledged.
    target.wait_until(|driver| driver.used_index() == 3);
    assert_eq!(target.status(2), 0);
    assert_eq!(target.bytes(DATA + 0x1000, 512), [0x77; 512]);
    target.used = 3;
    assert_eq!(target.request(IN, 0, Some((DATA, 512, WRITE))), (0, 513));
}

#[test]
fn an_unacknowledged_interrupt_is_raised_again_after_a_move() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let source = TestDriver::running(disk.clone());
    source.put(AVAIL + 2, 1000u16);
    source.notify();
    wait_without_interrupt(|| source.read(VIRTIO_MMIO_INTERRUPT_STATUS) != 0);
    source.device.pause().unwrap();
    let state = source.device.save().unwrap();
    let target = TestDriver::paused(disk, source.ram.clone());
    target.device.restore(&state).unwrap();
    assert!(target.device.interrupt_event().read().is_err());
    target.device.resume().unwrap();
    assert_eq!(target.device.interrupt_event().read().unwrap(), 1);
    assert_eq!(target.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
}

#[test]
fn the_image_stays_locked_while_the_device_runs() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let driver = TestDriver::running(disk.clone());
    assert!(disk.release().unwrap_err().to_string().contains("not paused"));
    driver.device.pause().unwrap();
    disk.release().unwrap();
    assert!(driver.device.resume().is_err());
    disk.acquire().unwrap();
    driver.device.resume().unwrap();
}

#[test]
fn hostile_state_is_refused() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let driver = TestDriver::running(disk.clone());
    driver.device.pause().unwrap();
    let good = driver.device.save().unwrap();
    let fresh = || TestDriver::paused(disk.clone(), driver.ram.clone());
    let decode = || postcard::from_bytes::<SavedState>(&good.state).unwrap();
    let changes: [&dyn Fn(&mut SavedState); 11] = [
        &|state| state.registers.status = 4,
        &|state| state.registers.status = 0x1f,
        &|state| state.registers.driver_features |= 1 << 5,
        &|state| state.registers.driver_features = 0,
        &|state| state.interrupt_status = 4,
        &|state| state.registers.queue.size = 512,
        &|state| state.registers.queue.used_ring = u64::MAX - 3,
        &|state| state.registers.queue.desc_table = HOLE,
        &|state| state.registers.queue.ready = false,
        &|state| state.indices = None,
        &|state| state.config.truncate(59),
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut state = decode();
        change(&mut state);
        let bytes = postcard::to_stdvec(&state).unwrap();
        assert!(fresh().device.restore(&DeviceState { state: bytes, ..good.clone() }).is_err(), "change {index}");
    }
    for length in 0..good.state.len() {
        let cut = DeviceState { state: good.state[..length].to_vec(), ..good.clone() };
        assert!(fresh().device.restore(&cut).is_err(), "{length} bytes");
    }
    let mut long = good.clone();
    long.state.push(0);
    assert!(fresh().device.restore(&long).is_err());
    assert!(fresh().device.restore(&DeviceState { version: 2, ..good.clone() }).is_err());
    assert!(fresh().device.restore(&DeviceState { id: "virtio-blk:other".into(), ..good.clone() }).is_err());
    fresh().device.restore(&good).unwrap();
}

const HOLE: u64 = 0xc000_0000;

#[test]
fn dropping_the_device_ends_its_thread() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let driver = TestDriver::running(disk.clone());
    driver.notify();
    let device: std::sync::Weak<VirtioMmio<VirtioBlk>> = Arc::downgrade(&driver.device);
    drop(driver);
    assert!(device.upgrade().is_none());
    // The thread held the image while it ran.
    disk.release().unwrap();
}

#[test]
fn a_missing_page_stops_the_disk_but_no_register() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let mut driver = TestDriver::running(disk);
    // The last huge page of RAM, where nothing was touched yet: in postcopy it would not have arrived.
    let missing = 6 << 20;
    let start = driver.ram.base().as_ptr().wrapping_add(missing);
    let uffd = userfaultfd::UffdBuilder::new().user_mode_only(false).create().unwrap();
    uffd.register(start.cast(), 2 << 20).unwrap();
    let (header, status) = driver.header(0, IN, 0);
    driver.put_chain(DESC, 0, &[header, (missing as u64, 4096, WRITE), status]);
    driver.offer(0);
    driver.notify();
    // Blocks until the disk's thread faults.
    let event = uffd.read_event().unwrap().unwrap();
    assert!(matches!(event, userfaultfd::Event::Pagefault { addr, .. } if addr.cast() == start));
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 15);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.notify();
    assert_eq!(driver.config(0, 8), SIZE / 512);
    driver.dirty();
    // SAFETY: the page lies in guest RAM, which lives as long as `driver`.
    unsafe { uffd.zeropage(start.cast(), 4096, true).unwrap() };
    driver.wait_until(|driver| driver.used_index() == 1);
    assert_eq!(driver.status(0), 0);
    assert!(driver.dirty().contains(&(missing as u64 / 4096)));
}

#[test]
fn the_device_connects_to_a_virtual_machine() {
    let (_directory, disk) = scratch_disk(SIZE, false);
    let driver = TestDriver::running(disk);
    let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()).expect("this test needs /dev/kvm");
    vm.create_irq_chip().unwrap();
    driver.device.connect(&vm, GuestAddress(BASE), 5).unwrap();
    // The same place or line twice is one too many.
    let refused = driver.device.connect(&vm, GuestAddress(BASE), 5).unwrap_err().to_string();
    assert!(refused.contains("virtio-blk:root") && refused.contains("ioeventfd"), "{refused}");
}
