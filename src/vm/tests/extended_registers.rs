//! AVX registers and XCR0 move: a guest in ring 3, where every KVM lets the processor itself run it, loads its registers once and tells
//! them again and again.

use kvm_bindings::kvm_segment;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vm::state::VcpuState;

const TABLES: u64 = ENTRY as u64 + 0x1000;
const LOADED: u64 = ENTRY as u64 + 0x4000;
const TOLD: u64 = ENTRY as u64 + 0x5000;
/// Where the 64-bit code begins.
const START: u64 = ENTRY as u64 + 0x10;
/// x87, SSE and AVX (Intel SDM volume 1, section 13.3).
const XCR0: u64 = 7;

/// What the guest writes at [`TOLD`], of which the count comes last.
const REGISTERS: usize = 16 * 32;
const TOLD_BYTES: usize = REGISTERS + 16;

/// `vmovdqu` between each of the sixteen YMM registers and 32 bytes of memory from RSI (`0x6f`: load) or RDI (`0x7f`: store) on.
fn all_registers(opcode: u8) -> Vec<u8> {
    let base = if opcode == 0x6f { 6 } else { 7 };
    let one = |register: u8| {
        let prefix = if register < 8 { 0xfe } else { 0x7e };
        let [low, high, ..] = (u32::from(register) * 32).to_le_bytes();
        [0xc5, prefix, opcode, 0x80 | (register & 7) << 3 | base, low, high, 0, 0]
    };
    (0..16).flat_map(one).collect()
}

fn code() -> Vec<u8> {
    // jmp . in 32-bit mode, until the state is made one of 64-bit mode.
    let mut code = vec![0xeb, 0xfe];
    code.resize((START - u64::from(ENTRY)) as usize, 0x90);
    code.extend(all_registers(0x6f));
    let again = code.len();
    // xor ecx, ecx; xgetbv; mov [rdi + 0x200], eax
    code.extend_from_slice(&[0x31, 0xc9, 0x0f, 0x01, 0xd0, 0x89, 0x87, 0, 2, 0, 0]);
    code.extend(all_registers(0x7f));
    // inc qword [rdi + 0x208]
    code.extend_from_slice(&[0x48, 0xff, 0x87, 8, 2, 0, 0]);
    let back = again as i32 - (code.len() as i32 + 5);
    code.push(0xe9);
    code.extend_from_slice(&back.to_le_bytes());
    code
}

/// Four levels of tables that map the first 4 MiB to themselves, for ring 3 as well.
fn tables() -> Vec<u8> {
    const USER_WRITABLE: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let mut tables = vec![0; 0x3000];
    for (at, entry) in [
        (0, (TABLES + 0x1000) | USER_WRITABLE),
        (0x1000, (TABLES + 0x2000) | USER_WRITABLE),
        (0x2000, LARGE | USER_WRITABLE),
        (0x2008, 2 << 20 | LARGE | USER_WRITABLE),
    ] {
        tables[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    tables
}

/// Ring 3 of 64-bit mode at [`START`], with AVX.
fn enter_ring_3(state: &mut VcpuState) {
    let (regs, sregs) = (&mut state.regs.0, &mut state.sregs.0);
    (regs.rip, regs.rsi, regs.rdi, regs.rflags) = (START, LOADED, TOLD, 2);
    sregs.cr0 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
    sregs.cr3 = TABLES;
    sregs.cr4 = 1 << 18 | 1 << 10 | 1 << 9 | 1 << 5; // OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
    sregs.efer = 0x500; // LMA, LME
    let segment = sregs.cs;
    sregs.cs = kvm_segment { selector: 0x33, limit: u32::MAX, type_: 11, dpl: 3, db: 0, l: 1, g: 1, ..segment };
    sregs.ss = kvm_segment { selector: 0x2b, type_: 3, db: 1, l: 0, ..sregs.cs };
    state.xcrs.0.xcrs[0].value = XCR0;
}

fn told(ram: &GuestRam) -> [u8; TOLD_BYTES] {
    let mut bytes = [0; TOLD_BYTES];
    // The guest may be writing: whoever compares takes what was told while it is paused.
    ram.memory().read_slice(&mut bytes, GuestAddress(TOLD)).unwrap();
    bytes
}

fn count(ram: &GuestRam) -> u64 {
    u64::from_le_bytes(told(ram)[REGISTERS + 8..].try_into().unwrap())
}

/// Until the guest has told all of its registers anew.
fn wait(ram: &GuestRam) {
    let (begin, before) = (Instant::now(), count(ram));
    while count(ram) < before + 2 {
        assert!(begin.elapsed() < LIMIT, "the guest tells nothing");
        std::thread::yield_now();
    }
}

#[test]
fn avx_registers_and_xcr0_move() {
    let pattern: Vec<u8> = (0..REGISTERS).map(|index| (index * 7 + index / 32) as u8 ^ 0xa5).collect();
    let kernel = kernel(&[(ENTRY.into(), &code()), (TABLES, &tables()), (LOADED, &pattern)]);
    let (mut vm, _console, _events) = build(kernel.to_path_buf(), "", 1, ram());
    vm.load_kernel().unwrap();
    let mut vm = pause(vm.start().unwrap());
    let mut state = vm.save().unwrap();
    enter_ring_3(&mut state.vcpus[0]);
    let (next, _console, mut events) = build(PathBuf::new(), "", 1, copy(vm.ram()));
    let mut running = resume(next.restore(&state).unwrap());
    for _ in 0..4 {
        wait(running.ram());
        let mut paused = pause(running);
        let before = told(paused.ram());
        assert!(before[..REGISTERS] == pattern, "the registers are not those that were loaded: {before:x?}");
        assert!(events.is_empty());
        // Compares what KVM says of registers and XCR0 at both machines.
        let (next, _console, next_events) = hop(&mut paused, |_| {});
        // What is told from here on comes from the registers that moved.
        next.ram().memory().write_slice(&[0; REGISTERS + 8], GuestAddress(TOLD)).unwrap();
        (running, events) = (resume(next), next_events);
        wait(running.ram());
        let mut again = pause(running);
        // Not compared with what was set: where ring 0 is emulated, the guest sees the host's XCR0.
        assert_eq!(told(again.ram())[..REGISTERS + 8], before[..REGISTERS + 8]);
        assert_eq!(again.save().unwrap().vcpus[0].xcrs.0.xcrs[0].value, XCR0);
        running = resume(again);
    }
}
