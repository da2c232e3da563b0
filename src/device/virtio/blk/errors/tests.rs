use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use crossbeam_channel::{Receiver, unbounded};
use vm_memory::{Bytes, GuestAddress};

use super::super::super::test_driver::*;
use super::super::VirtioBlk;
use super::*;
use crate::device::Device;
use crate::memory::GuestRam;
use crate::vm::config::{DiskOptions, ReadErrorAction};

const SIZE: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

/// A disk whose image, without its second half, fails reads of it; and a device that is set up.
struct Broken {
    _directory: tempfile::TempDir,
    disk: std::sync::Arc<Disk>,
    file: File,
    driver: TestDriver,
    errors: Receiver<BlockIoError>,
}

impl Broken {
    fn new(rerror: ReadErrorAction) -> Self {
        let (directory, disk) = scratch_disk_with(SIZE, false, DiskOptions { rerror, ..DiskOptions::default() });
        let file = OpenOptions::new().write(true).open(&disk.config().path).unwrap();
        file.write_all_at(&[0x77; 512], 0).unwrap();
        let (sender, errors) = unbounded();
        let device = VirtioBlk::new(disk.clone(), move |error| sender.send(error).unwrap());
        let mut driver = TestDriver::paused_with(device, GuestRam::allocate(8 << 20).unwrap());
        driver.device.resume().unwrap();
        let features = driver.features();
        driver.set_up(features);
        file.set_len(SIZE / 2).unwrap();
        Broken { _directory: directory, disk, file, driver, errors }
    }

    fn repair(&self) {
        self.file.set_len(SIZE).unwrap();
        self.file.write_all_at(&[0x99; 512], SIZE - 512).unwrap();
    }

    /// Offers reads of the first sector, the last, and the first again.
    fn offer_three(&mut self) {
        for (slot, sector) in [(0, 0), (1, SIZE / 512 - 1), (2, 0)] {
            let (header, status) = self.driver.header(slot, IN, sector);
            self.driver.put_chain(DESC, 3 * slot as u16, &[header, (DATA + slot * 4096, 512, WRITE), status]);
            self.driver.offer(3 * slot as u16);
        }
        self.driver.notify();
    }
}

fn check_three(driver: &TestDriver) {
    driver.wait_until(|driver| driver.used_index() == 3);
    for (slot, byte) in [(0, 0x77), (1, 0x99), (2, 0x77)] {
        assert_eq!(driver.status(slot), 0);
        assert_eq!(driver.bytes(DATA + slot * 4096, 512), [byte; 512]);
        assert_eq!(driver.used_element(slot as u16), (3 * slot as u32, 513));
    }
}

#[test]
fn a_request_that_stops_the_guest_is_done_again_when_it_goes_on() {
    let mut broken = Broken::new(ReadErrorAction::Stop);
    broken.offer_three();
    for attempt in 0..2 {
        let error = broken.errors.recv_timeout(LIMIT).unwrap();
        assert_eq!((error.operation, error.action, error.nospace), (IoOperation::Read, ErrorAction::Stop, false));
        assert_eq!(broken.disk.io_status(), IoStatus::Failed);
        // The driver sees what came before it done, and neither it nor what comes after it, however often it asks.
        broken.driver.wait_until(|driver| driver.used_index() == 1);
        broken.driver.notify();
        broken.driver.device.pause().unwrap();
        assert_eq!((broken.driver.used_index(), broken.driver.status(1)), (1, 0xff), "attempt {attempt}");
        if attempt == 1 {
            broken.repair();
        }
        broken.driver.device.resume().unwrap();
    }
    check_three(&broken.driver);
    assert_eq!(broken.disk.io_status(), IoStatus::Ok);
    assert!(broken.errors.try_recv().is_err());
}

#[test]
fn a_request_that_stopped_the_guest_is_done_at_another_host() {
    let mut broken = Broken::new(ReadErrorAction::Stop);
    broken.offer_three();
    broken.errors.recv_timeout(LIMIT).unwrap();
    broken.driver.device.pause().unwrap();
    let state = broken.driver.device.save().unwrap();
    broken.repair();
    let Broken { driver: TestDriver { ram, device, .. }, disk, .. } = broken;
    drop(device);
    let there = TestDriver::paused(disk, ram);
    there.device.restore(&state).unwrap();
    there.device.resume().unwrap();
    check_three(&there);
}

#[test]
fn a_reported_error_is_the_guest_s_and_many_of_them_are_told_once() {
    let mut broken = Broken::new(ReadErrorAction::Report);
    let started = Instant::now();
    for _ in 0..50 {
        assert_eq!(broken.driver.request(IN, SIZE / 512 - 1, Some((DATA, 512, WRITE))).0, 1);
    }
    assert_eq!(broken.driver.request(IN, 0, Some((DATA, 512, WRITE))).0, 0);
    // Out of range: the driver's own mistake.
    assert_eq!(broken.driver.request(IN, SIZE / 512, Some((DATA, 512, WRITE))).0, 1);
    let told = broken.errors.try_iter().collect::<Vec<_>>();
    assert!(!told.is_empty() && told.len() as u64 <= 1 + started.elapsed().as_secs(), "{told:?}");
    assert!(told.iter().all(|error| error.action == ErrorAction::Report), "{told:?}");
    assert_eq!(broken.disk.io_status(), IoStatus::Ok);
    broken.repair();
    broken.driver.ram.memory().write_slice(&[1; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(broken.driver.request(IN, SIZE / 512 - 1, Some((DATA, 512, WRITE))).0, 0);
    assert_eq!(broken.driver.bytes(DATA, 512), [0x99; 512]);
}
