//! The disk's workload: numbered blocks written and read back at random places, a few at a time.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use pagestorm::blocks::{Block, Content};
use pagestorm::cpu_record::CpuRecord;
use pagestorm::page::{self, Body, DISK_MAGIC, Stamp, mix};
use pagestorm::workload::{Pacer, Random};

use super::console::line;
use super::time::rdtsc;
use super::verdict::{self, Failure, fail};
use super::virtio_blk::{Device, Request, SLOTS};
use super::world::{RECORDS, World};

/// Blocks beyond this are not used, which bounds the table.
pub const MAX_BLOCKS: u64 = 1 << 20;
/// Every so many operations there is a flush...
const FLUSH_EVERY: u64 = 256;
/// ...and, if asked for, a discard or write-zeroes request.
const DISCARD_EVERY: u64 = 16;
/// Seconds in which a request must be done, not counting time in which the guest stood still.
const PATIENCE: u64 = 30;
/// Looks at requests in flight in a second, while there is nothing else to do.
const LOOKS_PER_SECOND: u64 = 10_000;

#[derive(Clone, Copy)]
struct InFlight {
    request: Request,
    block: u64,
    since: u64,
}

/// A disk and what is expected on it.
pub struct Disk {
    world: &'static World,
    record: &'static CpuRecord,
    device: Device,
    blocks: u64,
    magic: u64,
    slots: [Option<InFlight>; SLOTS],
    pacer: Pacer,
    random: Random,
    operations: u64,
    latest: u64,
    /// Cycles in which the guest ran.
    clock: u64,
    last_tsc: u64,
}

impl Disk {
    /// A device's first [`MAX_BLOCKS`]; of none is anything known.
    pub fn new(world: &'static World, device: Device) -> Self {
        let now = rdtsc();
        let magic = DISK_MAGIC | (mix(now) & 0xffff_ffff);
        let blocks = device.blocks().min(MAX_BLOCKS);
        line!(
            "pagestorm: disk blocks={blocks} magic={magic:#x} table={:#x} flush={} discard={} write_zeroes={}",
            world.layout.blocks,
            u8::from(device.takes(Request::Flush)),
            u8::from(device.takes(Request::Discard)),
            u8::from(device.takes(Request::WriteZeroes)),
        );
        Disk {
            world,
            record: &RECORDS[0],
            device,
            blocks,
            magic,
            slots: [None; SLOTS],
            pacer: Pacer::new(world.config.disk_rate, world.tsc_hz, now),
            random: Random::new(now),
            operations: 0,
            latest: 0,
            clock: 0,
            last_tsc: now,
        }
    }

    fn entry(&self, block: u64) -> &'static AtomicU32 {
        assert!(block < self.blocks);
        // SAFETY: inside the table, which the layout gives to this alone and which is always used as atomics.
        unsafe { &*(self.world.layout.blocks as *const AtomicU32).add(block as usize) }
    }

    fn expected(&self, block: u64) -> Block {
        Block::unpack(self.entry(block).load(Relaxed))
    }

    fn stamp(&self, block: u64, expected: Block) -> Stamp {
        Stamp {
            magic: self.magic,
            number: block,
            generation: expected.generation,
        }
    }

    /// Takes what is done and sends what is due; false if there was nothing to do.
    pub fn step(&mut self, now: u64) -> bool {
        let busy = self.take_finished(now);
        let Some(slot) = self.slots.iter().position(Option::is_none) else {
            return busy;
        };
        if !self.pacer.due(now) {
            return busy;
        }
        let (request, block) = self.choose();
        self.send(slot, request, block);
        true
    }

    /// When to look here again.
    pub fn next(&self, now: u64) -> u64 {
        if self.slots.iter().any(Option::is_some) {
            return now + self.world.tsc_hz / LOOKS_PER_SECOND;
        }
        self.pacer.next().unwrap_or(u64::MAX)
    }

    fn choose(&mut self) -> (Request, u64) {
        self.operations += 1;
        if self.operations.is_multiple_of(FLUSH_EVERY) && self.device.takes(Request::Flush) {
            return (Request::Flush, 0);
        }
        let place = self.random.below(self.blocks);
        let mut chosen = match self.random.below(2) {
            0 => (Request::Write, place),
            // Until much has been written a random block is mostly one of which nothing is known.
            _ if self.expected(place).content == Content::Unknown => (Request::Read, self.latest),
            _ => (Request::Read, place),
        };
        if self.world.config.disk_discard && self.operations.is_multiple_of(DISCARD_EVERY) {
            let request = [Request::Discard, Request::WriteZeroes][self.random.below(2) as usize];
            if self.device.takes(request) {
                chosen = (request, place);
            }
        }
        // Requests in flight come in any order, so no two may be for the same block.
        while self
            .slots
            .iter()
            .flatten()
            .any(|other| other.block == chosen.1)
        {
            chosen.1 = (chosen.1 + 1) % self.blocks;
        }
        chosen
    }

    fn send(&mut self, slot: usize, request: Request, block: u64) {
        if request == Request::Write {
            let stamp = self.stamp(block, self.expected(block).written());
            page::write(self.device.data(slot), stamp, Body::Random);
        }
        self.slots[slot] = Some(InFlight {
            request,
            block,
            since: self.clock,
        });
        self.device.submit(slot, request, block);
    }

    fn take_finished(&mut self, now: u64) -> bool {
        // A guest that stood still, or waited for its memory, has not waited for its disk.
        self.clock += now
            .saturating_sub(self.last_tsc)
            .min(self.world.tsc_hz / 10);
        self.last_tsc = now;
        let limit = self.clock.saturating_sub(PATIENCE * self.world.tsc_hz);
        if let Some(late) = self.slots.iter().flatten().find(|one| one.since < limit) {
            fail(Failure::DiskTimeout { block: late.block });
        }
        let mut any = false;
        while let Some((descriptor, status)) = self.device.poll() {
            any = true;
            let slot = descriptor as usize / 3;
            let finished = self.slots.get_mut(slot).and_then(Option::take);
            let Some(finished) = finished.filter(|_| descriptor % 3 == 0) else {
                fail(Failure::DiskQueue { descriptor });
            };
            if status != 0 {
                fail(Failure::DiskRequest {
                    block: finished.block,
                    request: finished.request,
                    status,
                });
            }
            self.account(slot, finished);
        }
        any
    }

    fn account(&mut self, slot: usize, finished: InFlight) {
        let block = finished.block;
        let expected = self.expected(block);
        match finished.request {
            Request::Flush => {}
            Request::Read => self.check(slot, block),
            Request::Write => {
                self.entry(block).store(expected.written().pack(), Relaxed);
                self.record.disk_writes.fetch_add(1, Relaxed);
                self.latest = block;
            }
            Request::Discard => {
                self.entry(block).store(
                    Block {
                        content: Content::Unknown,
                        ..expected
                    }
                    .pack(),
                    Relaxed,
                );
            }
            Request::WriteZeroes => {
                self.entry(block).store(
                    Block {
                        content: Content::Zeros,
                        ..expected
                    }
                    .pack(),
                    Relaxed,
                );
            }
        }
    }

    fn check(&mut self, slot: usize, block: u64) {
        let expected = self.expected(block);
        let stamp = self.stamp(block, expected);
        let words = self.device.data(slot);
        let result = match expected.content {
            Content::Unknown => return,
            Content::Zeros => page::check_zero(words),
            Content::Data => page::check(words, stamp, Body::Random),
        };
        if let Err(damage) = result {
            fail(Failure::Disk {
                block,
                expected: expected.generation,
                damage,
            });
        }
        self.record.disk_reads.fetch_add(1, Relaxed);
    }

    fn wait_for_slot(&mut self, all: bool) {
        let is_ready = |slots: &[Option<InFlight>; SLOTS]| match all {
            true => slots.iter().all(Option::is_none),
            false => slots.iter().any(Option::is_none),
        };
        while !is_ready(&self.slots) {
            self.take_finished(rdtsc());
            verdict::end_if_failed();
        }
    }

    /// Waits for what is in flight, flushes, reads every block back whose content is known, and prints what an outside
    /// checker needs.
    pub fn finish(&mut self) {
        self.wait_for_slot(true);
        if self.device.takes(Request::Flush) {
            self.send(0, Request::Flush, 0);
            self.wait_for_slot(true);
        }
        let (mut data, mut zeros, mut digest) = (0_u64, 0_u64, 0_u64);
        for block in 0..self.blocks {
            let expected = self.expected(block);
            match expected.content {
                Content::Unknown => continue,
                Content::Zeros => zeros += 1,
                Content::Data => {
                    data += 1;
                    digest = digest.wrapping_add(mix(mix(block) ^ u64::from(expected.generation)));
                }
            }
            self.wait_for_slot(false);
            if let Some(slot) = self.slots.iter().position(Option::is_none) {
                self.send(slot, Request::Read, block);
            }
        }
        self.wait_for_slot(true);
        line!(
            "pagestorm: disk data_blocks={data} zero_blocks={zeros} magic={:#x} digest={digest:#x}",
            self.magic
        );
    }
}
