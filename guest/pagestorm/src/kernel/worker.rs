//! A vCPU's share of the work: fills, dirties and checks the pages that it owns.

use core::sync::atomic::Ordering::*;

use pagestorm::cmdline::{Idle, Pattern, Rate};
use pagestorm::cpu_record::{CpuRecord, NOT_WRITING};
use pagestorm::page::{self, Body, PAGE_MAGIC, Stamp, Words};
use pagestorm::workload::{Pacer, Picker};

use super::boot::halt_until_interrupt;
use super::time::rdtsc;
use super::verdict::{Failure, fail};
use super::world::{RECORDS, World};

/// [`CpuRecord::phase`] of a vCPU that has filled its pages.
pub const FILLED: u64 = 2;
/// [`CpuRecord::phase`] of a vCPU whose last check is through.
pub const FINISHED: u64 = 3;

/// Even a guest that writes little checks every page in this many seconds...
const PASS_SECONDS: u64 = 10;
/// ...or sooner, if it can with so many pages a second over all vCPUs, which costs next to nothing...
const LEAST_BACKGROUND_CHECKS: u64 = 10_000;
/// ...but never with more than so many.
const MOST_BACKGROUND_CHECKS: u64 = 100_000;
/// No wait is longer than this part of a second, so that vCPUs notice what others do.
const WAITS_PER_SECOND: u64 = 10;
/// A vCPU that waits in `hlt` wakes up for work at most so often.
const TICKS_PER_SECOND: u64 = 1000;

/// One vCPU's work.
pub struct Worker {
    world: &'static World,
    record: &'static CpuRecord,
    first_page: u64,
    pages: u64,
    body: Body,
    picker: Picker,
    writes: Pacer,
    background_checks: Pacer,
    /// Checks that are due for pages written.
    owed: u64,
    /// Next page to check, counted from the first.
    cursor: u64,
    last_tsc: u64,
    /// Cycles over which a write is slow; 0: not measured.
    slow: u64,
}

fn stamp(number: u64, generation: u32) -> Stamp {
    Stamp {
        magic: PAGE_MAGIC,
        number,
        generation,
    }
}

impl Worker {
    /// The work of vCPU `cpu`, once the world has been published.
    pub fn new(world: &'static World, cpu: u32) -> Self {
        let record = &RECORDS[cpu as usize];
        let (config, cpus, now) = (&world.config, u64::from(world.cpus), rdtsc());
        let pages = record.pages.load(Relaxed);
        let rate = match config.rate {
            // What does not divide evenly goes to the first.
            Rate::PerSecond(rate) => {
                Rate::PerSecond(rate / cpus + u64::from(u64::from(cpu) < rate % cpus))
            }
            Rate::Max => Rate::Max,
        };
        let background = match config.verify {
            0 => 0,
            _ => pages
                .div_ceil(PASS_SECONDS)
                .clamp(
                    LEAST_BACKGROUND_CHECKS / cpus,
                    MOST_BACKGROUND_CHECKS / cpus,
                )
                .min(pages),
        };
        Worker {
            world,
            record,
            first_page: record.first_page.load(Relaxed),
            pages,
            body: match config.pattern {
                Pattern::Compressible => Body::Compressible,
                Pattern::Zero | Pattern::Random => Body::Random,
            },
            picker: Picker::new(config.order, pages, now ^ u64::from(cpu)),
            writes: Pacer::new(
                if pages == 0 { Rate::PerSecond(0) } else { rate },
                world.tsc_hz,
                now,
            ),
            background_checks: Pacer::new(Rate::PerSecond(background), world.tsc_hz, now),
            owed: 0,
            cursor: 0,
            last_tsc: now,
            slow: config.slow * (world.tsc_hz / 1_000_000),
        }
    }

    /// The address and contents of a page that this vCPU owns.
    fn page(&mut self, page: u64) -> (u64, &mut Words) {
        let owned = page.wrapping_sub(self.first_page) < self.pages;
        let Some(gpa) = self.world.layout.gpa(page).filter(|_| owned) else {
            panic!("not one of this vCPU's pages: {page}")
        };
        // The compiler must not assume that memory still holds what was written there.
        let words = core::hint::black_box(gpa as *mut Words);
        // SAFETY: the layout gives this page of mapped RAM to nothing else, no other vCPU owns it, and a
        // vCPU has one worker at a time.
        (gpa, unsafe { &mut *words })
    }

    /// Brings all pages of this vCPU into their first state.
    pub fn fill(&mut self) {
        for page in self.first_page..self.first_page + self.pages {
            if self.world.config.pattern == Pattern::Zero {
                let (_, words) = self.page(page);
                // Most RAM is zero from the start; reading it does not make the host allocate it.
                if page::check_zero(words).is_err() {
                    words.fill(0);
                }
            } else {
                self.write_page(page);
                self.record.filled.fetch_add(1, Relaxed);
            }
        }
        self.record.phase.store(FILLED, Release);
    }

    fn write_page(&mut self, page: u64) {
        let generation = self.world.generation(page).load(Relaxed) + 1;
        let body = self.body;
        // Whoever stops the guest and looks must not see a half-written page that is not announced here.
        self.record.writing.store(page, SeqCst);
        let (_, words) = self.page(page);
        page::write(words, stamp(page, generation), body);
        self.world.generation(page).store(generation, Release);
        self.record.writing.store(NOT_WRITING, Release);
    }

    fn check_next(&mut self) {
        let page = self.first_page + self.cursor;
        let generation = self.world.generation(page).load(Relaxed);
        let body = self.body;
        let (gpa, words) = self.page(page);
        let result = match generation {
            0 => page::check_zero(words),
            _ => page::check(words, stamp(page, generation), body),
        };
        if let Err(damage) = result {
            fail(Failure::Page {
                page,
                gpa,
                expected: generation,
                damage,
            });
        }
        self.record.reads.fetch_add(1, Relaxed);
        self.cursor += 1;
        if self.cursor == self.pages {
            self.cursor = 0;
            self.check_generation_sum();
            self.record.passes.fetch_add(1, Relaxed);
        }
    }

    fn check_generation_sum(&self) {
        let pages = self.first_page..self.first_page + self.pages;
        let found = pages
            .map(|page| u64::from(self.world.generation(page).load(Relaxed)))
            .sum();
        let expected = self.record.filled.load(Relaxed) + self.record.writes.load(Relaxed);
        if found != expected {
            fail(Failure::GenerationSum { expected, found });
        }
    }

    /// Writes or checks at most one page; false if nothing is due at `now`.
    pub fn step(&mut self, now: u64) -> bool {
        if now < self.last_tsc {
            fail(Failure::Tsc {
                before: self.last_tsc,
                after: now,
            });
        }
        self.last_tsc = now;
        if self.owed > 0 {
            self.owed -= 1;
            self.check_next();
        } else if self.writes.due(now) {
            let page = self.first_page + self.picker.pick();
            let began = rdtsc();
            self.write_page(page);
            if self.slow > 0 {
                let cycles = rdtsc() - began;
                if cycles > self.slow {
                    self.record.slow.add(cycles * 1_000_000 / self.world.tsc_hz);
                }
            }
            self.record.writes.fetch_add(1, Relaxed);
            self.owed = self.world.config.verify;
        } else if self.background_checks.due(now) {
            self.check_next();
        } else {
            return false;
        }
        true
    }

    /// Waits until there is something to do, but not past `until`.
    pub fn wait(&self, now: u64, until: u64) {
        if self.world.config.idle == Idle::Spin {
            return core::hint::spin_loop();
        }
        let hz = self.world.tsc_hz;
        let work = [self.writes.next(), self.background_checks.next()]
            .into_iter()
            .flatten()
            .min();
        let tick = now + hz / TICKS_PER_SECOND;
        let wake = work
            .unwrap_or(u64::MAX)
            .max(tick)
            .min(until)
            .min(now + hz / WAITS_PER_SECOND);
        let cycles = wake.saturating_sub(rdtsc());
        if cycles > 0 {
            self.world.timer.arm(cycles);
            halt_until_interrupt();
        }
    }

    /// Checks every page once more.
    pub fn finish(&mut self) {
        self.cursor = 0;
        for _ in 0..self.pages {
            self.check_next();
        }
        self.record.phase.store(FINISHED, Release);
    }
}
