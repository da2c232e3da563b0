//! A machine from its configuration: memory, disks, console.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Sender;

use super::{VmmError, lock};
use crate::block::disk::Disk;
use crate::block::io_error::BlockIoError;
use crate::device::serial::SerialPort;
use crate::device::virtio::blk::VirtioBlk;
use crate::device::virtio::mmio::VirtioMmio;
use crate::memory::GuestRam;
use crate::memory::dirty_tracker::TrackerChoice;
use crate::vm::config::GuestConfig;
use crate::vm::empty::EmptyVm;
use crate::vm::{Built, Vm, VmError, VmEvent, layout};

/// How long typed input waits for a guest that does not take it before it looks whether the guest is still the same.
const INPUT_TICK: Duration = Duration::from_millis(200);

/// What every machine of this process is connected to.
pub(super) struct Machine {
    console: Arc<Console>,
    serial: Mutex<Option<Arc<SerialPort>>>,
    tracker: TrackerChoice,
    events: Sender<VmEvent>,
    on_disk_error: Arc<dyn Fn(BlockIoError) + Send + Sync>,
}

type Output = Box<dyn Write + Send>;

/// The console, which outlives machines: a restarted guest writes on.
struct Console {
    output: Mutex<Output>,
    closed: AtomicBool,
}

struct SharedOutput(Arc<Console>);

impl Write for SharedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match lock(&self.0.output).write(bytes) {
            // The kick of a vCPU that is to end: nobody waits any more for a terminal or pipe that takes nothing.
            Err(error) if error.kind() == io::ErrorKind::Interrupted && self.0.closed.load(Ordering::Acquire) => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0.output).flush()
    }
}

impl Machine {
    /// Machines whose serial port writes to `console`, whose dirty pages can be tracked as `tracker` says, and which report to `events`
    /// and, of their disks, to `on_disk_error`; see [`VirtioBlk::new`].
    pub fn new(
        console: Output,
        tracker: TrackerChoice,
        events: Sender<VmEvent>,
        on_disk_error: impl Fn(BlockIoError) + Send + Sync + 'static,
    ) -> Self {
        Machine {
            console: Arc::new(Console { output: Mutex::new(console), closed: AtomicBool::new(false) }),
            serial: Mutex::default(),
            tracker,
            events,
            on_disk_error: Arc::new(on_disk_error),
        }
    }

    /// Builds a machine over `ram` with its disks and its console, in `empty`.
    pub fn build(&self, empty: EmptyVm, config: &GuestConfig, ram: GuestRam, disks: &[Arc<Disk>]) -> Result<Vm<Built>, VmmError> {
        let mut vm = Vm::<Built>::build_in(empty, config, ram, self.tracker, self.events.clone())?;
        for (slot, disk) in disks.iter().enumerate() {
            let attach = |reason: String| VmmError::Attach { id: disk.config().id.clone(), reason };
            let (address, gsi) = layout::virtio_slot(slot).ok_or(VmError::Slot(slot))?;
            let on_error = self.on_disk_error.clone();
            let device = VirtioBlk::new(disk.clone(), move |error| on_error(error));
            let device = VirtioMmio::new(vm.ram().clone(), device).map_err(|error| attach(error.to_string()))?;
            device.connect(vm.fd(), address, gsi).map_err(|error| attach(error.to_string()))?;
            vm.attach_virtio(slot, device.bus_device(), device)?;
        }
        vm.serial().set_output(Box::new(SharedOutput(self.console.clone())));
        *lock(&self.serial) = Some(vm.serial().clone());
        Ok(vm)
    }

    /// Gives what a person typed to the guest, as fast as it takes it.
    pub fn console_input(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Some(serial) = lock(&self.serial).clone() else { return };
            let taken = serial.input(bytes);
            bytes = bytes.get(taken..).unwrap_or_default();
            if taken == 0 {
                serial.wait_for_room(INPUT_TICK);
            }
        }
    }

    /// The guest is about to end: nobody takes input any more, and nobody waits for output.
    pub fn close(&self) {
        self.console.closed.store(true, Ordering::Release);
        lock(&self.serial).take();
    }
}
