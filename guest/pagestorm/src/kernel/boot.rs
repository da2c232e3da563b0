//! What `boot.s` defines: its symbols, under names that Rust can use safely.

use core::arch::global_asm;
use core::ptr;

use pagestorm::cmdline::MAX_CPUS;

global_asm!(include_str!("boot.s"), MAX_CPUS = const MAX_CPUS, options(att_syntax));

unsafe extern "C" {
    static kernel_end: u8;
    static trampoline_start: u8;
    static trampoline_end: u8;
    static exception_stubs: u8;
    static invalid_opcode: u8;
    static timer_interrupt: u8;
    static spurious_interrupt: u8;
    static mut idt: [[u64; 2]; 256];
    static mut next_cpu: u32;
    static mut page_directory_pointers: [u64; 512];
    static pvclock: [u32; 16];
    fn wait_for_interrupt();
}

/// Address after the kernel and its .bss.
pub fn end_of_kernel() -> u64 {
    &raw const kernel_end as u64
}

/// The real-mode start of the other vCPUs, position independent.
pub fn trampoline() -> &'static [u8] {
    let (start, end) = (&raw const trampoline_start, &raw const trampoline_end);
    // SAFETY: boot.s puts these two labels around the trampoline, in read-only text.
    unsafe { core::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Tells which index the next vCPU to start takes; [`MAX_CPUS`] and above make it stop.
pub fn set_next_cpu(index: u32) {
    // SAFETY: written by the boot vCPU alone, read by a starting vCPU.
    unsafe { ptr::write_volatile(&raw mut next_cpu, index) }
}

/// Addresses of the handlers in boot.s.
pub struct Handlers {
    /// Of exception 0; each next one is 16 bytes further.
    pub exceptions: u64,
    /// Of exception 6, which is also the way into `hlt`.
    pub invalid_opcode: u64,
    /// Ends the LAPIC interrupt.
    pub timer: u64,
    /// Does nothing.
    pub spurious: u64,
}

/// Where the handlers are.
pub fn handlers() -> Handlers {
    Handlers {
        exceptions: &raw const exception_stubs as u64,
        invalid_opcode: &raw const invalid_opcode as u64,
        timer: &raw const timer_interrupt as u64,
        spurious: &raw const spurious_interrupt as u64,
    }
}

/// Writes an entry of the interrupt descriptor table, which all vCPUs share.
pub fn set_idt_entry(vector: u8, entry: [u64; 2]) {
    // SAFETY: only the boot vCPU does this, before any other runs.
    unsafe {
        (&raw mut idt)
            .cast::<[u64; 2]>()
            .add(vector.into())
            .write_volatile(entry)
    }
}

/// Writes entry `index` (below 512) of the only page of page directory pointers.
pub fn set_page_directory_pointer(index: usize, entry: u64) {
    assert!(index < 512);
    // SAFETY: inside the table; only the boot vCPU does this, before any other runs.
    unsafe {
        (&raw mut page_directory_pointers)
            .cast::<u64>()
            .add(index)
            .write_volatile(entry)
    }
}

/// The 32-bit words of the boot vCPU's `pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst).
pub fn pvclock_words() -> [u32; 8] {
    // SAFETY: eight words of the sixteen that boot.s reserves; KVM may write them at any time.
    core::array::from_fn(|i| unsafe { (&raw const pvclock).cast::<u32>().add(i).read_volatile() })
}

/// Halts until an interrupt has been handled; one that is already pending counts.
pub fn halt_until_interrupt() {
    // SAFETY: the handler returns behind the invalid instruction with all registers as they were.
    unsafe { wait_for_interrupt() }
}
