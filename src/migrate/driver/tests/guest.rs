//! A guest of a few instructions that writes page after page, round and round, each with the next number.

use std::io::Write;

use crossbeam_channel::{Sender, unbounded};
use tempfile::NamedTempFile;

use crate::memory::dirty_tracker::TrackerChoice;
use crate::memory::{GuestRam, PAGE_SIZE, PageNumber, PageRun};
use crate::vm::config::{DiskConfig, GuestConfig};
use crate::vm::{Built, Running, Vm, VmEvent};

pub const RAM: u64 = 32 << 20;
/// Where the guest's code is loaded, the counter's page, and the first page it writes.
const CODE: u64 = 1 << 20;
/// Where in the code a round begins.
const OUTER: usize = 5;
const COUNTER: u64 = 512;
pub const FIRST: u64 = 513;
/// Written by the host before the guest starts, and never touched by the guest unless it is told to.
pub const STILL: u64 = 4096;

/// What the guest does: writes `pages` pages from [`FIRST`] on in turn, `pause` loops of nothing between two.
#[derive(Clone, Copy)]
pub struct Workload {
    pub pages: u64,
    pub pause: u32,
}

impl Workload {
    fn code(self) -> Vec<u8> {
        let page = |number: u64| (PageNumber(number).offset() as u32).to_le_bytes();
        let mut code = Vec::new();
        code.extend([0xbb]); // mov ebx, COUNTER
        code.extend(page(COUNTER));
        let outer = code.len();
        assert_eq!(outer, OUTER);
        code.extend([0xbf]); // mov edi, FIRST
        code.extend(page(FIRST));
        let inner = code.len();
        code.extend([0x48, 0xff, 0x03]); // inc qword [rbx]
        code.extend([0x48, 0x8b, 0x03]); // mov rax, [rbx]
        code.extend([0x48, 0x89, 0x07]); // mov [rdi], rax
        code.extend([0xb9]); // mov ecx, pause
        code.extend(self.pause.max(1).to_le_bytes());
        code.extend([0xff, 0xc9, 0x75, 0xfc]); // w: dec ecx; jnz w
        code.extend([0x81, 0xc7, 0, 0x10, 0, 0]); // add edi, 0x1000
        code.extend([0x81, 0xff]); // cmp edi, end
        code.extend(page(FIRST + self.pages));
        let back = |from: usize, to: usize| (to as i64 - from as i64 - 2) as i8 as u8;
        code.extend([0x72, back(code.len(), inner)]); // jb inner
        code.extend([0xeb, back(code.len(), outer)]); // jmp outer
        code
    }

    fn elf(self) -> NamedTempFile {
        let code = self.code();
        let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        elf.extend(2u16.to_le_bytes()); // ET_EXEC
        elf.extend(62u16.to_le_bytes()); // EM_X86_64
        elf.extend(1u32.to_le_bytes());
        elf.extend(CODE.to_le_bytes()); // e_entry
        elf.extend(64u64.to_le_bytes()); // e_phoff
        elf.extend(0u64.to_le_bytes());
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 64, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(1u32.to_le_bytes()); // PT_LOAD
        elf.extend(7u32.to_le_bytes());
        for word in [120, CODE, CODE, code.len() as u64, code.len() as u64, 0x1000] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(code);
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}

/// The page's first number.
pub fn number(ram: &GuestRam, page: u64) -> u64 {
    // SAFETY: mapped and aligned.
    unsafe { ram.host_address(PageRun::new(page, 1)).unwrap().cast::<u64>().as_ptr().read_volatile() }
}

pub fn counter(ram: &GuestRam) -> u64 {
    number(ram, COUNTER)
}

pub fn write(ram: &GuestRam, page: u64, value: u64) {
    // SAFETY: mapped and aligned.
    unsafe { ram.host_address(PageRun::new(page, 1)).unwrap().cast::<u64>().as_ptr().write_volatile(value) }
}

/// A guest that runs, over RAM of which [`STILL`] and the pages behind it hold their own numbers, and some zeros.
pub fn start(workload: Workload, disks: Vec<DiskConfig>) -> (Vm<Running>, GuestConfig) {
    start_with(workload, disks, unbounded().0)
}

/// The same; what the guest does to end itself goes to `events`.
pub fn start_with(workload: Workload, disks: Vec<DiskConfig>, events: Sender<VmEvent>) -> (Vm<Running>, GuestConfig) {
    let kernel = workload.elf();
    let config = GuestConfig {
        name: "tiny".into(),
        cpus: 1,
        memory: RAM,
        lock_memory: false,
        hugepages: false,
        kernel: kernel.path().into(),
        initrd: None,
        cmdline: String::new(),
        disks,
    };
    let ram = GuestRam::allocate(RAM).unwrap();
    for page in STILL..RAM / PAGE_SIZE as u64 {
        write(&ram, page, if page % 5 == 0 { 0 } else { page << 32 | 7 });
    }
    let mut vm = Vm::build(&config, ram, TrackerChoice::Auto, events).unwrap_or_else(|error| panic!("{error}"));
    vm.load_kernel().unwrap();
    (vm.start().unwrap_or_else(|error| panic!("{error}")), config)
}

/// What a guest's restart is to a migration: another machine over the same RAM, which begins to count anew.
pub fn restart(workload: Workload, vm: Vm<Running>) -> Vm<Running> {
    let kernel = workload.elf();
    let (config, ram) = (GuestConfig { kernel: kernel.path().into(), ..vm.config().clone() }, vm.ram().clone());
    drop(vm);
    write(&ram, COUNTER, 0);
    let mut vm = build(&config, ram);
    vm.load_kernel().unwrap();
    vm.start().unwrap_or_else(|error| panic!("{error}"))
}

pub fn build(config: &GuestConfig, ram: GuestRam) -> Vm<Built> {
    Vm::build(config, ram, TrackerChoice::Auto, unbounded().0).unwrap_or_else(|error| panic!("{error}"))
}

/// Puts an instruction that no processor has where the guest comes by each round, and it has no handler.
pub fn crash(ram: &GuestRam) {
    write(ram, CODE / PAGE_SIZE as u64, 0x0b0f << (8 * OUTER));
}

/// Every number in its place: what a guest that stands still has written is a matter of its counter alone.
pub fn check(ram: &GuestRam, workload: Workload) {
    let last = counter(ram);
    assert!(last > workload.pages, "the guest has not been round once");
    // The guest may stand between counting and writing.
    let written = |page: u64, last: u64| {
        let at = (last - 1) % workload.pages;
        last - (at + workload.pages - (page - FIRST)) % workload.pages
    };
    let position = FIRST + (last - 1) % workload.pages;
    for page in FIRST..FIRST + workload.pages {
        let found = number(ram, page);
        let between = page == position && found == last - workload.pages;
        assert!(between || found == written(page, last), "page {page:#x} holds {found}, not {}", written(page, last));
    }
    for page in STILL..RAM / PAGE_SIZE as u64 {
        assert_eq!(number(ram, page), if page % 5 == 0 { 0 } else { page << 32 | 7 }, "page {page:#x}");
    }
}

/// All of `page`, for comparing.
pub fn contents(ram: &GuestRam, page: u64) -> Vec<u8> {
    let start = ram.host_address(PageRun::new(page, 1)).unwrap();
    // SAFETY: mapped; no guest runs on it.
    unsafe { std::slice::from_raw_parts(start.as_ptr(), PAGE_SIZE) }.to_vec()
}
