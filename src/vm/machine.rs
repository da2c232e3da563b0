//! A guest's life as types: built, running, paused, moved. Every transition consumes the machine, so that a guest which was given up
//! cannot be run again.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use kvm_bindings::{KVM_CAP_X2APIC_API, kvm_cpuid_entry2, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_bindings::{KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS};
use kvm_ioctls::{Cap, VmFd};
use rustix::process::Pid;
use vmm_sys_util::eventfd::EventFd;

use super::config::GuestConfig;
use super::empty::EmptyVm;
use super::events::{EventSink, VmEvent};
use super::exits::{Buses, emulates_ring_0};
use super::lull::{Lull, Statistics};
use super::save_vcpu::Known;
use super::state::{Abi, MachineState, StateError};
use super::throttle::{Throttle, Throttler};
use super::vcpu::VcpuThread;
use super::{VmError, chips, clock, cpuid, layout, msr, restore_vcpu, save_vcpu};
use crate::boot;
use crate::device::Device;
use crate::device::bus::BusDevice;
use crate::device::cmos::Cmos;
use crate::device::power::{AcpiPower, I8042};
use crate::device::serial::SerialPort;
use crate::memory::GuestRam;
use crate::memory::dirty_tracker::{TrackerChoice, Tracking};

/// How long the vCPUs may take to stop. They stop within microseconds, unless one waits in a device for the outside world.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// A guest that stood still for longer is told so: shorter than what any watchdog of its lets pass, and longer than a migration takes, so
/// that it does not wait for this.
const LONG_PAUSE: Duration = Duration::from_millis(100);

/// Devices may still be attached; no guest code has run.
pub struct Built;
/// The vCPUs run.
pub struct Running;
/// The vCPUs are parked and the devices drained: RAM changes no more.
pub struct Paused;
/// The guest was given to another host. RAM can be read; the guest never runs here again.
pub struct Moved;

/// A virtual machine in the state `S`. Dropping it ends and joins the vCPU threads.
pub struct Vm<S> {
    machine: Box<Machine>,
    state: PhantomData<S>,
}

/// A transition that failed, with the machine back in the state it came from.
pub struct Failed<S> {
    /// The machine, as it was.
    pub vm: Vm<S>,
    /// Why.
    pub error: VmError,
}

impl<S> std::fmt::Debug for Failed<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Failed").field("error", &self.error).finish_non_exhaustive()
    }
}

struct Machine {
    // The threads end before the machine they run on: fields drop in this order. The one that kicks the vCPUs holds them.
    throttler: Mutex<Option<Throttler>>,
    vcpus: Arc<Vcpus>,
    throttle: Arc<Throttle>,
    lull: Lull,
    buses: Arc<Buses>,
    devices: Vec<Arc<dyn Device>>,
    serial: Arc<SerialPort>,
    power_button: EventFd,
    slots: Vec<usize>,
    events: EventSink,
    config: GuestConfig,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Of each vCPU.
    known: Vec<Known>,
    host_tsc_khz: u32,
    tracking: Tracking,
    /// When the guest last began to stand still, here or elsewhere.
    stood_still: Option<Instant>,
    fd: Arc<VmFd>,
    // After the descriptor: KVM maps this memory into the guest.
    ram: GuestRam,
}

/// All vCPU threads; told to end together, then joined one by one.
struct Vcpus(Vec<VcpuThread>);

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(VcpuThread::dismiss);
    }
}

impl<S> Vm<S> {
    /// KVM's descriptor of the machine.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.machine.fd
    }

    /// How its dirty pages can be tracked.
    pub fn tracking(&self) -> &Tracking {
        &self.machine.tracking
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.machine.ram
    }

    /// What the machine was built from.
    pub fn config(&self) -> &GuestConfig {
        &self.machine.config
    }

    /// COM1: give it an output, feed it input. The handle may outlive the machine.
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.machine.serial
    }

    /// Tells the guest that the power button was pressed, by the ACPI generic event device. Whether it powers off is its own affair.
    pub fn power_button(&self) -> Result<(), VmError> {
        self.machine.power_button.write(1).map_err(VmError::EventFd)
    }

    /// Makes all vCPUs stand still for `percent` of the time, at most 99; 0 ends that. An error is that of starting a thread.
    pub fn throttle(&self, percent: u8) -> std::io::Result<()> {
        let Machine { throttler, vcpus, throttle, .. } = &*self.machine;
        let mut throttler = throttler.lock().unwrap_or_else(PoisonError::into_inner);
        if percent == 0 {
            *throttler = None;
            return Ok(());
        }
        if throttler.is_none() {
            let vcpus = vcpus.clone();
            *throttler = Some(Throttler::start(throttle.clone(), move || vcpus.0.iter().for_each(VcpuThread::kick))?);
        }
        if let Some(throttler) = &*throttler {
            throttler.set(percent);
        }
        Ok(())
    }

    pub(super) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.machine.cpuid
    }

    /// Alike for all vCPUs but for their CPUID.
    pub(super) fn known(&self) -> Option<&Known> {
        self.machine.known.first()
    }

    fn into<T>(self) -> Vm<T> {
        Vm { machine: self.machine, state: PhantomData }
    }
}

impl Vm<Built> {
    /// Builds the machine over `ram`: interrupt controllers and timer in the kernel, memory slots, legacy devices, vCPUs with their threads
    /// parked. Its dirty pages can be tracked as `tracker` says. What the guest does to end itself is sent to `events`.
    pub fn build(config: &GuestConfig, ram: GuestRam, tracker: TrackerChoice, events: Sender<VmEvent>) -> Result<Self, VmError> {
        Self::build_in(EmptyVm::create()?, config, ram, tracker, events)
    }

    /// Like [`Vm::build`], in what was created ahead.
    pub fn build_in(
        empty: EmptyVm,
        config: &GuestConfig,
        ram: GuestRam,
        tracker: TrackerChoice,
        events: Sender<VmEvent>,
    ) -> Result<Self, VmError> {
        let EmptyVm { kvm, fd } = empty;
        let max = kvm.get_max_vcpus();
        if config.cpus == 0 || usize::from(config.cpus) > max {
            return Err(VmError::CpuCount { asked: config.cpus, max });
        }
        if !kvm.check_extension(Cap::ImmediateExit) {
            return Err(VmError::Missing("KVM_CAP_IMMEDIATE_EXIT"));
        }
        if config.cpus > 255 {
            // APIC IDs of more than 8 bits; changes how the local APIC's state is laid out, alike on both sides.
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            let cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, args: [flags.into(), 0, 0, 0], ..Default::default() };
            fd.enable_cap(&cap).map_err(VmError::kvm("KVM_CAP_X2APIC_API"))?;
        }
        let fd = Arc::new(fd);
        for slot in ram.slots() {
            let start = ram.host_address(slot.run).ok_or(VmError::OutOfMemory)?;
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.start.0,
                memory_size: slot.run.bytes(),
                userspace_addr: start.as_ptr() as u64,
            };
            // SAFETY: the region is the slot's own part of RAM, which `Machine` keeps mapped for longer than the descriptor.
            unsafe { fd.set_user_memory_region(region) }.map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        // After the memory: a new device makes KVM begin a grace period of a tick or two, and memory slots, which else wait 0.6 ms, would wait
        // for its end (`kvm_io_bus_register_dev` calls `call_srcu`, `kvm_swap_active_memslots` `synchronize_srcu_expedited`).
        chips::create(&fd)?;
        let tracking = Tracking::new(tracker, &fd, &ram, emulates_ring_0())?;
        let events = EventSink::new(events);
        let serial = Arc::new(SerialPort::new(irqfd(&fd, layout::COM1_GSI)?));
        let power_button = irqfd(&fd, layout::GED_GSI)?;
        let cmos = Cmos::default();
        let mut buses = Buses::default();
        let ports = &mut buses.ports;
        ports.insert(layout::COM1_PORT, layout::COM1_PORTS, Arc::new(Mutex::new(serial.registers())))?;
        ports.insert(layout::SLEEP_CONTROL_PORT.into(), 3, Arc::new(Mutex::new(AcpiPower(events.clone()))))?;
        ports.insert(layout::CMOS_PORT, 2, Arc::new(Mutex::new(cmos.clone())))?;
        ports.insert(layout::I8042_PORT, 1, Arc::new(Mutex::new(I8042::Data)))?;
        ports.insert(layout::I8042_COMMAND, 1, Arc::new(Mutex::new(I8042::Command(events.clone()))))?;
        let cpuid = cpuid::base(&kvm)?;
        let xsave_size = save_vcpu::xsave_size(&fd)?;
        let mut msrs: Arc<[u32]> = Arc::default();
        let mut host_tsc_khz = 0;
        let mut known = Vec::with_capacity(config.cpus.into());
        let throttle = Arc::new(Throttle::new());
        let mut vcpus = Vec::with_capacity(config.cpus.into());
        let mut statistics = Vec::with_capacity(config.cpus.into());
        for index in 0..config.cpus {
            let vcpu = fd.create_vcpu(index.into()).map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
            let its_cpuid = cpuid::for_vcpu(&cpuid, index, config.cpus)?;
            vcpu.set_cpuid2(&its_cpuid).map_err(VmError::kvm("KVM_SET_CPUID2"))?;
            if index == 0 {
                msrs = msr::indices(&kvm, &vcpu)?.into();
                host_tsc_khz = vcpu.get_tsc_khz().map_err(VmError::kvm("KVM_GET_TSC_KHZ"))?;
            }
            known.push(Known { msrs: msrs.clone(), xsave_size, cpuid: its_cpuid.as_slice().into(), tsc_khz: host_tsc_khz });
            tracking.add_vcpu(&vcpu)?;
            statistics.push(Statistics::of(&vcpu));
            vcpus.push(VcpuThread::spawn(index, vcpu, events.clone(), throttle.clone(), tracking.clone())?);
        }
        let machine = Machine {
            throttler: Mutex::default(),
            vcpus: Arc::new(Vcpus(vcpus)),
            throttle,
            lull: Lull::of(statistics.into_iter().collect()),
            buses: Arc::new(buses),
            devices: vec![serial.clone(), Arc::new(cmos)],
            serial,
            power_button,
            slots: Vec::new(),
            events,
            config: config.clone(),
            cpuid,
            known,
            host_tsc_khz,
            tracking,
            stood_still: None,
            fd,
            ram,
        };
        Ok(Vm { machine: Box::new(machine), state: PhantomData })
    }

    /// The ids of the vCPUs' threads, that of vCPU 0 first.
    pub fn vcpu_threads(&self) -> Vec<Pid> {
        self.machine.vcpus.0.iter().map(VcpuThread::id).collect()
    }

    /// Puts a virtio device into `slot` (see [`layout::virtio_slot`]): `registers` on the MMIO bus, `device` into the list of what is
    /// paused and saved.
    pub fn attach_virtio(&mut self, slot: usize, registers: Arc<Mutex<dyn BusDevice>>, device: Arc<dyn Device>) -> Result<(), VmError> {
        let (address, _) = layout::virtio_slot(slot).ok_or(VmError::Slot(slot))?;
        // Nobody else has the buses before the guest is started.
        let buses = Arc::get_mut(&mut self.machine.buses).ok_or(VmError::Slot(slot))?;
        buses.mmio.insert(address.0, layout::VIRTIO_SIZE, registers).map_err(|_| VmError::Slot(slot))?;
        self.machine.slots.push(slot);
        self.machine.devices.push(device);
        Ok(())
    }

    /// Loads kernel, initrd and command line of the configuration and sets the vCPUs up to boot them. Comes after the devices are
    /// attached: the ACPI tables list them.
    pub fn load_kernel(&mut self) -> Result<(), VmError> {
        let machine = &*self.machine;
        let entry = boot::load(&machine.config, &machine.ram, &machine.slots)?;
        machine
            .on_each_vcpu(|index| {
                Ok(move |vcpu: &mut kvm_ioctls::VcpuFd| {
                    boot::firmware_state(vcpu)?;
                    if index == 0 { entry.apply(vcpu) } else { Ok(()) }
                })
            })?
            .into_iter()
            .collect::<Result<(), _>>()
            .map_err(VmError::kvm("setting the vCPU up to boot"))
    }

    /// Starts the guest.
    pub fn start(self) -> Result<Vm<Running>, VmError> {
        self.machine.resume()?;
        Ok(self.into())
    }

    /// Loads the state of a machine that was paused elsewhere, instead of a kernel. Userfaultfd service must run before: loading state may
    /// touch RAM.
    pub fn restore(mut self, state: &MachineState) -> Result<Vm<Paused>, VmError> {
        self.machine.restore(state)?;
        Ok(self.into())
    }
}

impl Vm<Running> {
    /// For waiting until it sleeps.
    pub fn lull(&self) -> &Lull {
        &self.machine.lull
    }

    /// Stops the vCPUs, then drains the devices. When it returns, RAM changes no more.
    pub fn pause(mut self) -> Result<Vm<Paused>, Failed<Running>> {
        match self.machine.pause() {
            Ok(()) => Ok(self.into()),
            Err(error) => match self.machine.resume() {
                Ok(()) => Err(Failed { vm: self, error }),
                // What hindered the pause is the better answer of the two.
                Err(_) => Err(Failed { vm: self, error }),
            },
        }
    }
}

impl Vm<Paused> {
    /// Lets the guest go on.
    pub fn resume(self) -> Result<Vm<Running>, Failed<Paused>> {
        match self.machine.resume() {
            Ok(()) => Ok(self.into()),
            Err(error) => Err(Failed { vm: self, error }),
        }
    }

    /// The state of the machine. May write guest RAM, so dirty pages are harvested once more after it.
    pub fn save(&mut self) -> Result<MachineState, VmError> {
        self.machine.save()
    }

    /// Gives up the right to run this guest, for good.
    pub fn give_up(self) -> Vm<Moved> {
        self.into()
    }
}

impl Machine {
    /// Pauses: the vCPUs first, so that no device is given new work while it is drained.
    fn pause(&mut self) -> Result<(), VmError> {
        let now = Instant::now();
        let deadline = now + PAUSE_LIMIT;
        self.stood_still = Some(now);
        let pending = self.vcpus.0.iter().map(VcpuThread::pause).collect::<Result<Vec<_>, _>>()?;
        for answer in pending {
            answer.wait_until(deadline)?;
        }
        for device in &self.devices {
            device.pause()?;
        }
        Ok(())
    }

    /// Resumes: the devices first, so that they are there when a vCPU asks for them.
    fn resume(&self) -> Result<(), VmError> {
        for (index, device) in self.devices.iter().enumerate() {
            if let Err(error) = device.resume() {
                // None of them may work on for a guest that stays paused.
                for resumed in self.devices.iter().take(index) {
                    let _ = resumed.pause();
                }
                return Err(error.into());
            }
        }
        let tell_guest = self.stood_still.is_some_and(|since| since.elapsed() >= LONG_PAUSE);
        for vcpu in &self.vcpus.0 {
            vcpu.run(&self.buses, tell_guest)?;
        }
        Ok(())
    }

    /// Saves: devices, which may still raise interrupts, then the vCPUs, then the chips and the clock.
    fn save(&self) -> Result<MachineState, VmError> {
        if let Some(event) = self.events.sent() {
            return Err(VmError::Ended(event.clone()));
        }
        let devices = self.devices.iter().map(|device| device.save()).collect::<Result<_, _>>()?;
        let vcpus = self.on_each_vcpu(|index| {
            let known = self.known(index)?.clone();
            Ok(move |vcpu: &mut kvm_ioctls::VcpuFd| save_vcpu::save(vcpu, &known))
        })?;
        let vcpus = name_vcpus(vcpus)?;
        let chips = chips::save(&self.fd)?;
        let scaled = self.known(0)?.tsc_khz != self.host_tsc_khz;
        let offset = vcpus.first().and_then(|first| first.tsc_offset);
        let clock = self.first_vcpu()?.call_here(|vcpu| clock::save(&self.fd, vcpu, offset, scaled))??;
        let cpuid = self.cpuid.iter().copied().map(Abi).collect();
        Ok(MachineState { cpuid, vcpus, chips, clock, devices })
    }

    /// Restores: features, then the clock, then the vCPUs, whose timers run against it, then the chips, which deliver interrupts to the
    /// vCPUs, then the devices, which raise them.
    fn restore(&mut self, state: &MachineState) -> Result<(), VmError> {
        let (saved, machine) = (state.vcpus.len(), self.vcpus.0.len());
        let Some(first) = state.vcpus.first().filter(|_| saved == machine) else {
            return Err(StateError::Cpus { saved, machine }.into());
        };
        let states: Vec<_> = state.vcpus.iter().cloned().map(Arc::new).collect();
        let vcpu_state = |index: u16| states.get(usize::from(index)).cloned().ok_or(StateError::Cpus { saved, machine });
        let prepared = name_vcpus(self.on_each_vcpu(|index| {
            let (state, known) = (vcpu_state(index)?, self.known(index)?.clone());
            Ok(move |vcpu: &mut kvm_ioctls::VcpuFd| restore_vcpu::prepare(vcpu, &state, known))
        })?)?;
        self.known = prepared;
        let khz = first.tsc_khz;
        // From here on the guest is what it was elsewhere: what it needs of its next host is what its first one gave it.
        self.cpuid = state.cpuid.iter().map(|entry| entry.0).collect();
        let scaled = khz != self.host_tsc_khz;
        let restore = |vcpu: &mut _| clock::restore(&self.fd, vcpu, &state.clock, first.tsc_offset, khz, scaled);
        let clocks = self.first_vcpu()?.call_here(restore)??;
        self.stood_still = Instant::now().checked_sub(clocks.passed.min(LONG_PAUSE));
        name_vcpus(self.on_each_vcpu(|index| {
            let (state, known) = (vcpu_state(index)?, self.known(index)?.clone());
            Ok(move |vcpu: &mut kvm_ioctls::VcpuFd| restore_vcpu::restore(vcpu, &state, &known, clocks))
        })?)?;
        let msrs: Arc<[u32]> = first.msrs.iter().map(|msr| msr.index).collect();
        self.known.iter_mut().for_each(|known| known.msrs.clone_from(&msrs));
        chips::restore(&self.fd, &state.chips)?;
        for saved in &state.devices {
            if !self.devices.iter().any(|device| device.id() == saved.id) {
                return Err(StateError::Devices(saved.id.clone()).into());
            }
        }
        for device in &self.devices {
            let mut saved = state.devices.iter().filter(|saved| saved.id == device.id());
            let (Some(saved), None) = (saved.next(), saved.next()) else {
                return Err(StateError::Devices(device.id().into()).into());
            };
            device.restore(saved)?;
        }
        Ok(())
    }

    fn known(&self, index: u16) -> Result<&Known, VmError> {
        self.known.get(usize::from(index)).ok_or(VmError::VcpuGone(index))
    }

    fn first_vcpu(&self) -> Result<&VcpuThread, VmError> {
        self.vcpus.0.first().ok_or(VmError::VcpuGone(0))
    }

    /// Calls the function that `make` makes for each parked vCPU, all at the same time: that of the first here, the others on their threads.
    fn on_each_vcpu<T, F>(&self, make: impl Fn(u16) -> Result<F, VmError>) -> Result<Vec<T>, VmError>
    where
        T: Send + 'static,
        F: FnOnce(&mut kvm_ioctls::VcpuFd) -> T + Send + 'static,
    {
        let calls = (1..).zip(self.vcpus.0.iter().skip(1)).map(|(index, vcpu)| vcpu.call(make(index)?));
        let pending: Vec<_> = calls.collect::<Result<_, _>>()?;
        let first = self.first_vcpu()?.call_here(make(0)?);
        std::iter::once(first).chain(pending.into_iter().map(|pending| pending.wait())).collect()
    }
}

/// Puts the vCPU's number to the first error.
fn name_vcpus<T>(results: Vec<Result<T, VmError>>) -> Result<Vec<T>, VmError> {
    let named = |(index, result): (u16, Result<T, VmError>)| result.map_err(|source| VmError::Vcpu { index, source: Box::new(source) });
    (0..).zip(results).map(named).collect()
}

/// An eventfd that raises `gsi` when written.
fn irqfd(fd: &VmFd, gsi: u32) -> Result<EventFd, VmError> {
    let event = EventFd::new(libc::EFD_NONBLOCK).map_err(VmError::EventFd)?;
    fd.register_irqfd(&event, gsi).map_err(VmError::kvm("KVM_IRQFD"))?;
    Ok(event)
}
