//! pagestorm: a bare-metal x86-64 test kernel that fills RAM, keeps dirtying it at a given rate, writes to a
//! disk, and checks all of it all the time. It tells whether a virtual machine monitor, above all one
//! that migrates the guest while it runs, has lost or mixed up anything.
//!
//! It starts through its PVH note, so `qemu-system-x86_64 -kernel` (microvm, pc, q35) and Ferry boot the same
//! file. Ring 0 is a few instructions of assembler (`kernel/boot.s`); all Rust runs in ring 3 with
//! interrupts disabled and with access to all memory and ports, because some KVMs emulate ring 0.
//!
//! # Command line
//! `key=value` words; sizes take K, M and G. Anything else is refused with a line that says so.
//!
//! | key | default | meaning |
//! |---|---|---|
//! | `fill` | 16M | bytes of RAM used as pages, or `all` |
//! | `pattern` | random | `random`, `compressible`, or `zero`: pages stay zero until first dirtied, then are random |
//! | `rate` | 1000 | pages dirtied a second over all vCPUs, or `max`; what falls behind by over 10 ms is dropped |
//! | `order` | sequential | `sequential`, `random`, or `hotcold`: 90 % of the writes to the first 10 % of a vCPU's pages |
//! | `verify` | 1 | pages checked for each page dirtied; 0 is no checking but at the end. Else all pages are also checked every 10 s or sooner (by 10000 to 100000 checks a second), but not more than once a second |
//! | `cpus` | 1 | vCPUs used, up to 32 (APIC identifiers 0, 1, 2...); fewer if one does not answer within a second |
//! | `disk` | off | `on`: write and check the first virtio-blk disk on virtio-mmio (version 2), destroying what is on it |
//! | `disk_rate` | 100 | operations a second, or `max` |
//! | `disk_discard` | off | `on`: discard and write-zeroes requests too, where the disk has them |
//! | `heartbeat` | 100 | milliseconds between heartbeats, 0 for none; missed ones are not made up for |
//! | `heartbeat_byte` | off | `on`: a heartbeat is the byte `.` and nothing else; `writes`: a byte that tells how many pages were dirtied since the last one, 128 and that number, of which at most 127 are told by one byte. Such bytes end with a line feed before the `stat` or `slow` lines |
//! | `stat` | on | `off`: no `stat` and `verdict ok` lines but at the end of a run: printing them takes the boot vCPU 10 to 30 ms each second |
//! | `slow` | 0 | microseconds: writes of pages that take longer are counted and told at the end of a run; 0 is not |
//! | `idle` | hlt | waiting: `hlt` (wakes for work at most every millisecond, for heartbeats exactly), or `spin` |
//! | `run` | 0 | seconds until a last check of everything and power-off; 0 is for ever |
//! | `tsc_khz` | | TSC frequency, where neither kvmclock nor a PIT tells it |
//! | `corrupt` | | number of a page of which a bit is flipped after a second, to see the verdict (with `rate=0`, or it may be overwritten unseen) |
//!
//! # Output
//! Lines on COM1, all from the boot vCPU, so they never mix:
//!
//! - `pagestorm: boot cpus=N cpus_wanted=N ram=BYTES tsc_khz=N cmdline="..."`
//! - `pagestorm: segment first_page=N gpa=0xN pages=N`, for each run of pages
//! - `pagestorm: filled pages=N first_gpa=0xN generations=0xN cpu_records=0xN`: all pages have their first contents
//! - `pagestorm: disk blocks=N magic=0xN table=0xN flush=0|1 discard=0|1 write_zeroes=0|1`, and at the end of a
//!   run `pagestorm: disk data_blocks=N zero_blocks=N magic=0xN digest=0xN`
//! - `hb seq=N tsc=N`
//! - each second, for each vCPU, `stat cpu=N seq=N writes=N reads=N passes=N disk_writes=N disk_reads=N`: pages
//!   dirtied and checked, whole passes over the vCPU's pages, disk blocks written, read back and checked
//! - with `slow=N` at the end of a run, before the last `stat` lines, for each vCPU, `slow cpu=N us=US:COUNT,US:COUNT,...`: how many
//!   of its writes of pages took longer than that, by duration: from US microseconds to an eighth of an octave above
//! - `verdict ok passes=N` after the counters when every vCPU has come through more passes than it said last, and
//!   with ` final=1` at the end of a run. A page that was damaged at some moment has been checked when
//!   `passes` has grown by two since.
//! - `verdict bad reason=R ... apic=N`: what is wrong, found by the vCPU with this APIC identifier. The guest ends.
//! - `pagestorm: error ...`: the command line, RAM or disk does not do. The guest ends.
//!
//! | reason | further words |
//! |---|---|
//! | `stale` (lost write, older generation), `ahead` (the table is older than the page), `torn` (parts of two generations, or damaged), `zeroed`, `not_zero`, `number` (another page), `magic` | `page`, `gpa`, `expected_gen`, `offset` in the page, and `found_gen`, `found_number` or `found_magic` |
//! | `disk_` and one of these | `block`, `expected_gen`, `offset`, and so on |
//! | `disk_request`, `disk_timeout`, `disk_queue` | a request failed with `status`, took over 30 s, was never sent |
//! | `generation_sum` | `expected` (writes counted), `found` (sum of the table): a table or counter is stale |
//! | `tsc_backwards` | `before`, `after` |
//! | `exception`, `panic` | `vec`, `err`, `rip`, `cr2`; `line` |
//!
//! At the end the guest writes to isa-debug-exit (0xf4: 0x10 all was well, 0x11 not), then powers off.
//!
//! # Checking from outside
//! A test that has stopped the guest finds everything at the addresses printed:
//!
//! - Page `first_page + i` of a segment is at `gpa + 4096 * i`; its format is described in `page.rs`.
//! - `generations` has a little-endian 32-bit word for each page, in order: its expected generation. 0 means
//!   never written (all zero). A page is written before its entry is.
//! - `cpu_records` has a page for each vCPU, described in `cpu_record.rs`: which pages it owns, and which one it is
//!   writing, whose contents and entry may be halfway. All others must agree with their entries, and the sum of a
//!   vCPU's entries must be its `filled` + `writes`, plus one if it was stopped between an entry and the count.
//! - A disk block is at byte 4096 * number, in the same format with the magic of the `disk` line. `table` has
//!   a 32-bit word for each: what it holds and its generation, described in `blocks.rs`. Up to 4
//!   requests may be in flight unless the run has ended; then `digest` is the wrapping sum, over the blocks that hold
//!   data, of `mix(mix(number) ^ generation)` (`page.rs`).
#![no_std]
#![no_main]

mod kernel;

use core::fmt;
use core::sync::atomic::Ordering::*;

use kernel::console::{self, line};
use kernel::disk::{self, Disk};
use kernel::reporter::Reporter;
use kernel::start_info::Loaded;
use kernel::time::rdtsc;
use kernel::virtio_blk::{Device, SLOTS};
use kernel::worker::{self, Worker};
use kernel::world::{self, RECORDS, World, stage};
use kernel::{boot, cpus, exceptions, lapic, paging, port, power, time, verdict};
use pagestorm::cmdline;
use pagestorm::layout::Layout;

/// The boot vCPU, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn boot_cpu_main(start_info: u32) -> ! {
    exceptions::install();
    lapic::remember_boot_cpu();
    lapic::init();
    console::init();
    // A PIC that firmware left open would interrupt with vectors of exceptions.
    port::out8(0x21, 0xff);
    port::out8(0xa1, 0xff);

    let Some(loaded) = Loaded::read(start_info) else {
        refuse(format_args!("no_start_info"))
    };
    let config = cmdline::parse(loaded.command_line()).unwrap_or_else(|problem| refuse(problem));
    let tsc_hz = config.tsc_khz.map(|khz| khz * 1000).or_else(time::tsc_hz);
    let Some(tsc_hz) = tsc_hz else {
        refuse(format_args!("unknown_tsc_frequency give=tsc_khz=N"))
    };
    let device = config
        .disk
        .then(|| Device::find().unwrap_or_else(|problem| refuse(problem)));
    let blocks = device
        .as_ref()
        .map_or(0, |device| device.blocks().min(disk::MAX_BLOCKS));
    if device.is_some() && blocks <= SLOTS as u64 {
        refuse(format_args!("disk_too_small blocks={blocks}"));
    }
    let layout = Layout::plan(loaded.ram(), boot::end_of_kernel(), config.fill, blocks);
    let layout = layout.unwrap_or_else(|problem| refuse(problem));
    paging::map_high_memory(&layout);
    clear(layout.generations, layout.pages * 4);
    clear(layout.blocks, blocks * 4);

    let ram: u64 = loaded
        .ram()
        .iter()
        .map(|region| region.end - region.start)
        .sum();
    let timer = lapic::Timer::calibrate(tsc_hz / 1000);
    let cpus = cpus::start(config.cpus, tsc_hz);
    line!(
        "pagestorm: boot cpus={cpus} cpus_wanted={} ram={ram} tsc_khz={} cmdline=\"{}\"",
        config.cpus,
        tsc_hz / 1000,
        loaded.command_line()
    );
    let world = World {
        config,
        layout,
        tsc_hz,
        timer,
        cpus,
    };
    run(&world, device)
}

fn run(world: &World, device: Option<Device>) -> ! {
    // SAFETY: this function does not return, so its caller's world lives for ever.
    let world: &'static World = unsafe { &*core::ptr::from_ref(world) };
    world::publish(world);
    Worker::new(world, 0).fill();
    wait_for_all(world, worker::FILLED);
    announce(world);
    world::set_stage(stage::RUN);

    let start = rdtsc();
    let end = (world.config.run > 0).then(|| start + world.config.run * world.tsc_hz);
    let mut corrupt = world.config.corrupt;
    let mut worker = Worker::new(world, 0);
    let mut disk = device.map(|device| Disk::new(world, device));
    let mut reporter = Reporter::new(world, start);
    loop {
        let now = rdtsc();
        verdict::end_if_failed();
        reporter.print_due(now);
        if end.is_some_and(|end| now >= end) {
            break;
        }
        if now - start > world.tsc_hz
            && let Some(page) = corrupt.take()
        {
            corrupt_page(world, page);
        }
        let disk_busy = disk.as_mut().is_some_and(|disk| disk.step(now));
        let busy = worker.step(now) || disk_busy;
        if !busy {
            let disk = disk.as_ref().map_or(u64::MAX, |disk| disk.next(now));
            worker.wait(now, reporter.next().min(end.unwrap_or(u64::MAX)).min(disk));
        }
    }
    world::set_stage(stage::FINAL);
    worker.finish();
    if let Some(disk) = &mut disk {
        disk.finish();
    }
    wait_for_all(world, worker::FINISHED);
    reporter.print_slow();
    reporter.print_stat();
    line!("verdict ok passes={} final=1", reporter.finished_passes());
    power::off(power::Outcome::Good)
}

/// Another vCPU, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn application_cpu_main(cpu: u32) -> ! {
    lapic::init();
    RECORDS[cpu as usize].phase.store(cpus::ONLINE, Release);
    let world = world::wait_for_world();
    if cpu >= world.cpus {
        power::stop();
    }
    Worker::new(world, cpu).fill();
    world::wait_for_stage(stage::RUN);
    let mut worker = Worker::new(world, cpu);
    while world::current_stage() == stage::RUN {
        let now = rdtsc();
        if !worker.step(now) {
            worker.wait(now, u64::MAX);
        }
    }
    worker.finish();
    power::stop()
}

fn wait_for_all(world: &World, phase: u64) {
    for record in RECORDS.iter().take(world.cpus as usize) {
        while record.phase.load(Acquire) != phase {
            verdict::end_if_failed();
            core::hint::spin_loop();
        }
    }
}

fn announce(world: &World) {
    let layout = &world.layout;
    for segment in layout.segments() {
        line!(
            "pagestorm: segment first_page={} gpa={:#x} pages={}",
            segment.first_page,
            segment.gpa,
            segment.pages
        );
    }
    line!(
        "pagestorm: filled pages={} first_gpa={:#x} generations={:#x} cpu_records={:#x}",
        layout.pages,
        layout.gpa(0).unwrap_or(0),
        layout.generations,
        &raw const RECORDS as u64,
    );
}

/// Flips a bit of a page, to show that this does not go unnoticed.
fn corrupt_page(world: &World, page: u64) {
    match world.layout.gpa(page) {
        Some(gpa) => {
            let byte = (gpa + 2048) as *mut u8;
            // SAFETY: RAM that holds nothing but the page; harm is what is wanted.
            unsafe { byte.write_volatile(byte.read_volatile() ^ 1) };
            line!("pagestorm: corrupted page={page} gpa={gpa:#x} offset=2048");
        }
        None => line!("pagestorm: nothing corrupted, no page={page}"),
    }
}

fn clear(gpa: u64, bytes: u64) {
    // SAFETY: the layout gives this mapped RAM to a table that is not in use yet.
    unsafe { core::ptr::write_bytes(gpa as *mut u8, 0, bytes as usize) }
}

/// Says why nothing can be done, and ends.
fn refuse(why: impl fmt::Display) -> ! {
    line!("pagestorm: error {why}");
    power::off(power::Outcome::Bad)
}
