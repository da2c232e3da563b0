//! pagestorm.
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
    let world: &'static World = unsafe { &*(&raw const *world) };
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
