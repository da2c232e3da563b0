//! A failed check: any vCPU may find one, the boot vCPU prints it.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering::*};

use pagestorm::page::Damage;

use super::console::{self, line};
use super::virtio_blk::Request;
use super::{lapic, power};

/// What was found wrong.
#[derive(Clone, Copy)]
pub enum Failure {
    /// A page in RAM.
    Page {
        page: u64,
        gpa: u64,
        expected: u32,
        damage: Damage,
    },
    /// The generations of a vCPU's pages do not add up to its writes: a page of the table or the record is stale.
    GenerationSum { expected: u64, found: u64 },
    /// A block on the disk.
    Disk {
        block: u64,
        expected: u32,
        damage: Damage,
    },
    /// The disk failed a request.
    DiskRequest {
        block: u64,
        request: Request,
        status: u8,
    },
    /// The disk did not answer.
    DiskTimeout { block: u64 },
    /// The disk answered what it had not been asked.
    DiskQueue { descriptor: u32 },
    /// The TSC went backwards.
    Tsc { before: u64, after: u64 },
    /// An exception on some vCPU.
    Exception {
        vector: u64,
        error: u64,
        rip: u64,
        cr2: u64,
    },
    /// A Rust panic.
    Panic { line: u32 },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Failure::Page {
                page,
                gpa,
                expected,
                damage,
            } => {
                write!(
                    f,
                    "reason={} page={page} gpa={gpa:#x} expected_gen={expected}",
                    damage.reason()
                )?;
                describe(f, damage)
            }
            Failure::GenerationSum { expected, found } => {
                write!(f, "reason=generation_sum expected={expected} found={found}")
            }
            Failure::Disk {
                block,
                expected,
                damage,
            } => {
                write!(
                    f,
                    "reason=disk_{} block={block} expected_gen={expected}",
                    damage.reason()
                )?;
                describe(f, damage)
            }
            Failure::DiskRequest {
                block,
                request,
                status,
            } => {
                write!(
                    f,
                    "reason=disk_request request={request:?} block={block} status={status}"
                )
            }
            Failure::DiskTimeout { block } => write!(f, "reason=disk_timeout block={block}"),
            Failure::DiskQueue { descriptor } => {
                write!(f, "reason=disk_queue descriptor={descriptor}")
            }
            Failure::Tsc { before, after } => {
                write!(f, "reason=tsc_backwards before={before} after={after}")
            }
            Failure::Exception {
                vector,
                error,
                rip,
                cr2,
            } => {
                write!(
                    f,
                    "reason=exception vec={vector} err={error:#x} rip={rip:#x} cr2={cr2:#x}"
                )
            }
            Failure::Panic { line } => write!(f, "reason=panic line={line}"),
        }
    }
}

fn describe(f: &mut fmt::Formatter<'_>, damage: Damage) -> fmt::Result {
    match damage {
        Damage::Stale { found } | Damage::Ahead { found } => write!(f, " found_gen={found}")?,
        Damage::Number { found } => write!(f, " found_number={found}")?,
        Damage::Magic { found } => write!(f, " found_magic={found:#x}")?,
        Damage::NotZero { .. } | Damage::Zeroed | Damage::Torn { .. } => {}
    }
    write!(f, " offset={}", damage.offset())
}

const NONE: u32 = 0;
const BEING_STORED: u32 = 1;
const STORED: u32 = 2;

/// The first failure, with the APIC identifier of the vCPU that found it.
struct First {
    state: AtomicU32,
    failure: UnsafeCell<Option<(u32, Failure)>>,
}

// SAFETY: the cell is written once, by whoever moves `state` from NONE, and read after it is STORED.
unsafe impl Sync for First {}

static FIRST: First = First {
    state: AtomicU32::new(NONE),
    failure: UnsafeCell::new(None),
};

/// Reports a failure and ends this vCPU's work; the boot vCPU ends the guest.
pub fn fail(failure: Failure) -> ! {
    let apic = lapic::id();
    if FIRST
        .state
        .compare_exchange(NONE, BEING_STORED, Acquire, Relaxed)
        .is_ok()
    {
        // SAFETY: see `First`.
        unsafe { *FIRST.failure.get() = Some((apic, failure)) };
        FIRST.state.store(STORED, Release);
    }
    if lapic::is_boot_cpu() {
        print_and_end(apic, failure);
    }
    power::stop()
}

/// For the boot vCPU: if some vCPU has failed, says so and ends the guest.
pub fn end_if_failed() {
    if FIRST.state.load(Acquire) == STORED {
        // SAFETY: see `First`.
        if let Some((apic, failure)) = unsafe { *FIRST.failure.get() } {
            print_and_end(apic, failure);
        }
    }
}

fn print_and_end(apic: u32, failure: Failure) -> ! {
    console::end_line();
    line!("verdict bad {failure} apic={apic}");
    power::off(power::Outcome::Bad)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    fail(Failure::Panic {
        line: info.location().map_or(0, |location| location.line()),
    })
}
