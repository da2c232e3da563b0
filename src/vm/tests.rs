//! Real guests on this host's KVM: a few instructions of machine code each.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::GuestRam;
use crate::memory::dirty_tracker::TrackerChoice;
use crate::vm::config::GuestConfig;

mod extended_registers;

const LIMIT: Duration = Duration::from_secs(20);

/// What the guest wrote to its serial port.
#[derive(Clone, Default)]
struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().unwrap().extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn wait_for(&self, what: &str, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let waiting = |bytes: &mut Vec<u8>| !done(bytes);
        let (bytes, timeout) = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), LIMIT, waiting).unwrap();
        assert!(!timeout.timed_out(), "no {what}; so far: {}", String::from_utf8_lossy(&bytes));
        bytes.clone()
    }
}

fn build(kernel: PathBuf, cmdline: &str, cpus: u16, ram: GuestRam) -> (Vm<Built>, Console, Receiver<VmEvent>) {
    let config = GuestConfig {
        name: "test".into(),
        cpus,
        memory: ram.size(),
        lock_memory: false,
        hugepages: false,
        kernel,
        initrd: None,
        cmdline: cmdline.into(),
        disks: Vec::new(),
    };
    let (sender, events) = unbounded();
    let vm = Vm::build(&config, ram, TrackerChoice::Auto, sender).unwrap();
    let console = Console::default();
    vm.serial().set_output(Box::new(console.clone()));
    (vm, console, events)
}

/// Another guest's RAM of the same size and contents.
fn copy(ram: &GuestRam) -> GuestRam {
    let copy = GuestRam::allocate(ram.size()).unwrap();
    // SAFETY: two distinct mappings of that size, whose guests are paused.
    unsafe { ram.base().copy_to_nonoverlapping(copy.base(), ram.size() as usize) };
    copy
}

fn pause(vm: Vm<Running>) -> Vm<Paused> {
    vm.pause().unwrap()
}

fn resume(vm: Vm<Paused>) -> Vm<Running> {
    vm.resume().unwrap()
}

/// Machine code for [`ENTRY`], in 32-bit protected mode.
mod code {
    /// Writes A to Z to COM1, over and over: mov dx, 0x3f8; 1: mov al, 'A'; 2: out dx, al; inc al; cmp al, 'Z' + 1; jne 2b; jmp 1b.
    pub const ALPHABET: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xfe, 0xc0, 0x3c, b'Z' + 1, 0x75, 0xf9, 0xeb, 0xf5];
    /// The same for a to z, in real mode at [`super::START_UP`].
    pub const REAL_MODE_ALPHABET: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'a', 0xee, 0xfe, 0xc0, 0x3c, b'z' + 1, 0x75, 0xf9, 0xeb, 0xf5];
    /// INIT and start-up interrupt (vector 1) for all other processors by the local APIC's command register, then [`ALPHABET`].
    pub const START_OTHERS: &[u8] =
        &[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00, 0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x01, 0x46, 0x0c, 0x00];
    /// The string at [`super::LETTERS`] by string output: mov dx, 0x3f8; 1: mov esi, LETTERS; mov ecx, 26; rep outsb; jmp 1b.
    pub const STRINGS: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xbe, 0x00, 0x01, 0x10, 0x00, 0xb9, 26, 0, 0, 0, 0xf3, 0x6e, 0xeb, 0xf2];
    /// Copies a register of virtio slot 0 to its neighbour: mov ebx, 0xd0000000; 1: mov eax, [ebx]; mov [ebx + 4], eax; jmp 1b.
    pub const ECHO: &[u8] = &[0xbb, 0, 0, 0, 0xd0, 0x8b, 0x03, 0x89, 0x43, 0x04, 0xeb, 0xf9];
    /// Writes "ok", then 0x34 to port 0x600; 1: hlt; jmp 1b.
    pub const POWER_OFF: &[u8] =
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'o', 0xee, 0xb0, b'k', 0xee, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
    /// Writes 1 to port 0x602, then as above.
    pub const RESET: &[u8] = &[0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd];
    /// Writes 0xfe to port 0x64, then as above.
    pub const KEYBOARD_RESET: &[u8] = &[0x66, 0xba, 0x64, 0x00, 0xb0, 0xfe, 0xee, 0xf4, 0xeb, 0xfd];
    /// Writes "o", waits until [`super::FLAG`] is not 0: 1: cmp byte [FLAG], 0; je 1b; and sleeps: 2: hlt; jmp 2b.
    pub const SLEEP: &[u8] =
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'o', 0xee, 0x80, 0x3d, 0x00, 0x02, 0x10, 0x00, 0x00, 0x74, 0xf7, 0xf4, 0xeb, 0xfd];
    /// int3 without an interrupt table.
    pub const CRASH: &[u8] = &[0xcc];
}

const ENTRY: u32 = 0x10_0000;
const LETTERS: u64 = 0x10_0100;
const FLAG: u64 = 0x10_0200;
const START_UP: u64 = 0x1000;

/// An ELF file with a PVH note for [`ENTRY`] and `segments` of (guest address, bytes).
fn kernel(segments: &[(u64, &[u8])]) -> tempfile::TempPath {
    let mut note = Vec::new();
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY] {
        note.extend_from_slice(&u32::to_le_bytes(word));
    }
    let parts = std::iter::once((4u32, 0, note.as_slice())).chain(segments.iter().map(|(address, bytes)| (1u32, *address, *bytes)));
    let count = segments.len() + 1;
    let mut headers = b"\x7fELF\x02\x01\x01".to_vec();
    headers.resize(16, 0);
    headers.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [u64::from(ENTRY), 64, 0] {
        headers.extend_from_slice(&word.to_le_bytes());
    }
    for half in [0, 0, 64, 56, count as u16, 0, 0, 0] {
        headers.extend_from_slice(&u16::to_le_bytes(half));
    }
    let mut body = Vec::new();
    for (kind, address, bytes) in parts {
        let offset = (64 + 56 * count + body.len()) as u64;
        headers.extend_from_slice(&kind.to_le_bytes());
        headers.extend_from_slice(&7u32.to_le_bytes());
        for word in [offset, address, address, bytes.len() as u64, bytes.len() as u64, 1] {
            headers.extend_from_slice(&word.to_le_bytes());
        }
        body.extend_from_slice(bytes);
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[headers, body].concat()).unwrap();
    file.into_temp_path()
}

fn ram() -> GuestRam {
    GuestRam::allocate(4 << 20).unwrap()
}

fn boot(code: &[u8]) -> (Vm<Running>, Console, Receiver<VmEvent>) {
    let kernel = kernel(&[(ENTRY.into(), code)]);
    let (mut vm, console, events) = build(kernel.to_path_buf(), "", 1, ram());
    vm.load_kernel().unwrap();
    (vm.start().unwrap(), console, events)
}

/// Moves a paused guest to another machine over a copy of its RAM, through the encoding, and checks that the copy's state is the same
/// but for clocks that run on.
fn hop(vm: &mut Vm<Paused>, attach: impl Fn(&mut Vm<Built>)) -> (Vm<Paused>, Console, Receiver<VmEvent>) {
    let state = vm.save().unwrap();
    let (mut next, console, events) = build(PathBuf::new(), "", vm.config().cpus, copy(vm.ram()));
    attach(&mut next);
    let decoded = MachineState::from_bytes(&state.to_bytes().unwrap()).unwrap();
    let mut next = next.restore(&decoded).unwrap();
    let again = next.save().unwrap();
    let tsc = |state: &MachineState| state.vcpus.iter().map(|vcpu| vcpu.msrs[0].value).collect::<Vec<_>>();
    assert!(tsc(&state).iter().zip(tsc(&again)).all(|(before, after)| *before <= after), "the TSC went backwards");
    assert_eq!(without_clocks(state).to_bytes().unwrap(), without_clocks(again).to_bytes().unwrap());
    (next, console, events)
}

fn without_clocks(mut state: MachineState) -> MachineState {
    for vcpu in &mut state.vcpus {
        assert_eq!(vcpu.msrs[0].index, msr::TSC);
        vcpu.msrs[0].value = 0;
        vcpu.tsc_offset = None;
        // Without the TSC deadline, which is kept, only this counts down by itself.
        vcpu.lapic.0.regs[0x390..0x394].fill(0);
    }
    for channel in &mut state.chips.pit.0.channels {
        channel.count_load_time = 0;
    }
    state.clock = clock::ClockState::default();
    state
}

/// Whether `bytes` count through the letters from `first` on without a gap.
fn is_alphabet(bytes: &[u8], first: u8) -> bool {
    bytes.windows(2).all(|pair| pair[1] == if pair[0] == first + 25 { first } else { pair[0] + 1 })
}

#[test]
fn a_guest_that_is_slowed_down_goes_on_and_can_be_paused() {
    let kernel = kernel(&[(ENTRY.into(), code::ALPHABET)]);
    let (mut vm, console, _events) = build(kernel.to_path_buf(), "", 2, GuestRam::allocate(64 << 20).unwrap());
    vm.load_kernel().unwrap();
    let mut vm = vm.start().unwrap();
    for percent in [50, 99, 0, 99] {
        vm.throttle(percent).unwrap();
        let before = console.wait_for("start", |_| true).len();
        console.wait_for("progress", |bytes| bytes.len() > before + 100);
        let paused = pause(vm);
        vm = resume(paused);
    }
}

#[test]
fn powers_off_and_resets() {
    let (vm, console, events) = boot(code::POWER_OFF);
    assert_eq!(events.recv_timeout(LIMIT), Ok(VmEvent::PowerOff));
    console.wait_for("ok", |bytes| bytes == b"ok");
    assert!(matches!(pause(vm).save(), Err(VmError::Ended(VmEvent::PowerOff))));
    for code in [code::RESET, code::KEYBOARD_RESET] {
        let (vm, _, events) = boot(code);
        assert_eq!(events.recv_timeout(LIMIT), Ok(VmEvent::Reset));
        // What the owner does then.
        let ram = vm.ram().clone();
        drop(vm);
        ram.clear().unwrap();
        let kernel = kernel(&[(ENTRY.into(), code::POWER_OFF)]);
        let (mut vm, _, events) = build(kernel.to_path_buf(), "", 1, ram);
        vm.load_kernel().unwrap();
        let _vm = vm.start().unwrap();
        assert_eq!(events.recv_timeout(LIMIT), Ok(VmEvent::PowerOff));
    }
}

#[test]
fn a_crash_is_told_with_its_vcpu() {
    let (vm, _, events) = boot(code::CRASH);
    let Ok(VmEvent::Crashed { vcpu: 0, reason }) = events.recv_timeout(LIMIT) else { panic!("no crash") };
    if emulates_ring_0() {
        assert!(reason.contains("bytes: cc") && reason.contains("neither VMX nor SVM"), "{reason}");
    } else {
        assert!(reason.contains("triple fault"), "{reason}");
    }
    // A machine with a stuck vCPU can still be paused and dropped.
    drop(pause(vm));
}

#[test]
fn port_output_goes_on_where_it_was_paused() {
    let strings: &[(u64, &[u8])] = &[(ENTRY.into(), code::STRINGS), (LETTERS, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")];
    for segments in [&[(ENTRY.into(), code::ALPHABET)], strings] {
        let kernel = kernel(segments);
        let (mut vm, mut console, _events) = build(kernel.to_path_buf(), "", 1, ram());
        vm.load_kernel().unwrap();
        let mut vm = vm.start().unwrap();
        let mut output = Vec::new();
        for _ in 0..20 {
            console.wait_for("output", |bytes| bytes.len() > 100);
            let mut paused = pause(vm);
            let (next, next_console, _) = hop(&mut paused, |_| {});
            // After the pause nothing is written any more.
            output.extend(console.wait_for("output", |_| true));
            (vm, console) = (resume(next), next_console);
        }
        output.extend(console.wait_for("output", |bytes| bytes.len() > 100));
        assert!(output.len() > 2000 && is_alphabet(&output, b'A'), "{}", String::from_utf8_lossy(&output));
    }
}

#[test]
fn two_vcpus_move_together() {
    let code = [code::START_OTHERS, code::ALPHABET].concat();
    let kernel = kernel(&[(ENTRY.into(), &code), (START_UP, code::REAL_MODE_ALPHABET)]);
    let (mut vm, mut console, mut events) = build(kernel.to_path_buf(), "", 2, ram());
    vm.load_kernel().unwrap();
    let mut vm = vm.start().unwrap();
    let mut output = Vec::new();
    for round in 0..10 {
        // The first move comes as early as it can: the second processor may not have started.
        let both = |bytes: &[u8]| round == 0 || (bytes.iter().any(u8::is_ascii_lowercase) && bytes.iter().any(u8::is_ascii_uppercase));
        console.wait_for("output of both processors", both);
        let mut paused = pause(vm);
        let (next, next_console, next_events) = hop(&mut paused, |_| {});
        output.extend(console.wait_for("output", |_| true));
        assert!(events.is_empty());
        (vm, console, events) = (resume(next), next_console, next_events);
    }
    let (lower, upper): (Vec<u8>, Vec<u8>) = output.into_iter().partition(u8::is_ascii_lowercase);
    assert!(is_alphabet(&lower, b'a') && is_alphabet(&upper, b'A'));
    assert!(!lower.is_empty() && !upper.is_empty());
}

/// A register that reads as one more each time, and one that must be written with what was read last.
#[derive(Default)]
struct Counter {
    read: u32,
    written: u32,
    wrong: bool,
}

impl crate::device::bus::BusDevice for Counter {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.wrong |= self.read != self.written;
        self.read += 1;
        data.copy_from_slice(&self.read.to_le_bytes());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.written = u32::from_le_bytes(data.try_into().unwrap());
        self.wrong |= offset != 4 || self.written != self.read;
    }
}

struct Stateless;

impl crate::device::Device for Stateless {
    fn id(&self) -> &str {
        "counter"
    }

    fn pause(&self) -> Result<(), crate::device::DeviceError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), crate::device::DeviceError> {
        Ok(())
    }

    fn save(&self) -> Result<crate::device::DeviceState, crate::device::DeviceError> {
        Ok(crate::device::DeviceState { id: self.id().into(), version: 1, state: Vec::new() })
    }

    fn restore(&self, _: &crate::device::DeviceState) -> Result<(), crate::device::DeviceError> {
        Ok(())
    }
}

#[test]
fn mmio_is_neither_lost_nor_repeated_over_a_move() {
    let counter = Arc::new(Mutex::new(Counter::default()));
    let attach = |vm: &mut Vm<Built>| vm.attach_virtio(0, counter.clone(), Arc::new(Stateless)).unwrap();
    let kernel = kernel(&[(ENTRY.into(), code::ECHO)]);
    let (mut vm, _, _events) = build(kernel.to_path_buf(), "", 1, ram());
    attach(&mut vm);
    assert!(matches!(vm.attach_virtio(0, counter.clone(), Arc::new(Stateless)), Err(VmError::Slot(0))));
    vm.load_kernel().unwrap();
    let mut vm = vm.start().unwrap();
    for _ in 0..50 {
        let from = counter.lock().unwrap().read;
        let deadline = Instant::now() + LIMIT;
        while counter.lock().unwrap().read < from + 50 {
            assert!(Instant::now() < deadline, "the guest does not run");
            std::thread::yield_now();
        }
        vm = resume(hop(&mut pause(vm), attach).0);
    }
    drop(pause(vm));
    assert!(!counter.lock().unwrap().wrong);
}

#[test]
fn paused_guest_resumes_here_and_gives_up_for_good() {
    let (vm, console, _events) = boot(code::ALPHABET);
    console.wait_for("output", |bytes| !bytes.is_empty());
    let vm = pause(vm);
    let before = console.wait_for("output", |_| true).len();
    let vm = resume(vm);
    let output = console.wait_for("more output", |bytes| bytes.len() > before + 100);
    assert!(is_alphabet(&output, b'A'));
    let moved = pause(vm).give_up();
    assert_eq!(moved.ram().size(), 4 << 20);
}

#[test]
fn state_of_another_machine_is_refused() {
    let (vm, _, _events) = boot(code::ALPHABET);
    let mut vm = pause(vm);
    let state = vm.save().unwrap();
    let refusal = |cpus, change: fn(&mut MachineState)| {
        let mut state = state.clone();
        change(&mut state);
        build(PathBuf::new(), "", cpus, ram()).0.restore(&state).err().unwrap().to_string()
    };
    assert!(refusal(2, |_| {}).contains("1 vCPUs"));
    assert!(refusal(1, |state| state.vcpus.clear()).contains("0 vCPUs"));
    assert!(refusal(1, |state| state.devices.clear()).contains("serial"));
    assert!(refusal(1, |state| state.devices[0].id = "x".into()).contains("device x"));
    assert!(refusal(1, |state| state.vcpus[0].msrs[3].index = 0x1234_5678).contains("0x12345678"));
    assert!(refusal(1, |state| state.vcpus[0].xsave.resize(1 << 20, 0)).contains("XSAVE"));
}

#[test]
fn facts_of_a_machine_are_accepted_by_its_own_host() {
    let (vm, _, _events) = boot(code::ALPHABET);
    let facts = facts::MachineFacts::of(&vm);
    let host = facts::HostFacts::read().unwrap();
    assert_eq!(facts.refusals(&host), [""; 0]);
    let (next, _, _) = hop(&mut pause(vm), |_| {});
    assert_eq!(facts::MachineFacts::of(&next).refusals(&host), [""; 0]);
}

#[test]
fn wall_clocks_that_disagree_do_not_move_the_guest_beyond_what_is_known() {
    let (vm, _, _events) = boot(code::ALPHABET);
    let mut vm = pause(vm);
    let state = vm.save().unwrap();
    let progress = |seconds, bounds: std::ops::RangeInclusive<u64>| {
        let mut state = state.clone();
        state.clock.age(seconds);
        state.bound_blackout(Duration::from_secs(*bounds.start())..=Duration::from_secs(*bounds.end()));
        let mut next = build(PathBuf::new(), "", 1, ram()).0.restore(&state).unwrap();
        let after = next.save().unwrap();
        assert!(after.vcpus[0].msrs[0].value >= state.vcpus[0].msrs[0].value);
        (after.clock.nanoseconds() - state.clock.nanoseconds()) / 1_000_000_000
    };
    // The restore itself takes far less than these.
    assert!((1000..1010).contains(&progress(1000, 0..=2000)));
    assert!((500..510).contains(&progress(1000, 0..=500)));
    assert!((100..110).contains(&progress(0, 100..=500)));
}

#[test]
fn impossible_machines_are_refused() {
    let mut config = build(PathBuf::new(), "", 1, ram()).0.config().clone();
    for cpus in [0, u16::MAX] {
        config.cpus = cpus;
        assert!(matches!(Vm::build(&config, ram(), TrackerChoice::Auto, unbounded().0), Err(VmError::CpuCount { .. })));
    }
}
#[test]
fn damaged_state_is_refused_without_harm() {
    let (vm, _, _events) = boot(code::ALPHABET);
    let bytes = pause(vm).save().unwrap().to_bytes().unwrap();
    assert!(MachineState::from_bytes(&bytes[..4]).is_err());
    assert!(MachineState::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
    for length in (0..bytes.len()).step_by(61) {
        assert!(MachineState::from_bytes(&bytes[..length]).is_err());
    }
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    let changes = proptest::collection::vec((0..bytes.len(), any::<u8>()), 1..20);
    TestRunner::new(config)
        .run(&changes, |changes| {
            let mut bytes = bytes.clone();
            for (index, value) in changes {
                bytes[index] = value;
            }
            if let Ok(state) = MachineState::from_bytes(&bytes) {
                // Accepted or refused by KVM; it must not end this process, nor a guest that then runs on nonsense.
                if let Ok(vm) = build(PathBuf::new(), "", 1, ram()).0.restore(&state) {
                    drop(resume(vm));
                }
            }
            Ok(())
        })
        .unwrap();
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = MachineState::from_bytes(&bytes);
        let _ = MachineState::from_bytes(&[b"FRYM\x01\0", &bytes[..]].concat());
    }
}

#[test]
fn a_guest_is_seen_to_go_to_sleep() {
    let kernel = kernel(&[(ENTRY.into(), code::SLEEP), (FLAG, &[0])]);
    let ram = GuestRam::allocate(4 << 20).unwrap();
    let (mut vm, console, _events) = build(kernel.to_path_buf(), "", 1, ram.clone());
    vm.load_kernel().unwrap();
    let vm = vm.start().unwrap();
    let lull = vm.lull().clone();
    let sleepers = lull.sleepers().expect("this KVM tells who sleeps");
    console.wait_for("letter", |bytes| bytes == b"o");
    assert!(!sleepers.all_sleep());
    // It comes back although the guest does not sleep.
    lull.wait();
    ram.memory().write_obj(1u8, GuestAddress(FLAG)).unwrap();
    let deadline = Instant::now() + LIMIT;
    while !sleepers.all_sleep() {
        assert!(Instant::now() < deadline, "the guest is not seen to sleep");
        std::thread::yield_now();
    }
    // And although it sleeps for good.
    lull.wait();
    drop(pause(vm));
    // The machine is gone, and nobody sleeps.
    lull.wait();
}
