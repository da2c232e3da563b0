//! What the source counts and measures of what its driver has sent, and how it tells of it.

use std::time::Duration;

#[cfg(doc)]
use super::Bulk;
use super::{Source, State};
use crate::block::block_run::COPY_BLOCK;
use crate::memory::PAGE_SIZE;
use crate::migrate::policy::{Goal, History};
use crate::migrate::report::{Progress, Report, Status};
use crate::migrate::wire::{Channel, Frame};

/// A pass that sent less than this says nothing about bandwidth.
const MEASURABLE_BYTES: u64 = 1 << 20;

/// What the driver made of a [`Bulk`] or an urgent answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages that went as contents.
    pub normal: u64,
    /// Pages that went as zero runs.
    pub zero: u64,
    /// Pages whose contents were compressed; of those that went as contents.
    pub compressed: u64,
    /// Bytes that this has saved.
    pub saved: u64,
    /// Bytes of everything on the wire.
    pub bytes: u64,
    /// Whether these were blocks of a disk.
    pub blocks: bool,
    /// Time spent in sending, without looking at pages or waiting for a bandwidth limit.
    pub busy: Duration,
}

impl Source {
    /// The driver has sent a [`Bulk::Pages`] on the connection `channel`. Returns whether none is left to be sent: who polls may be waiting
    /// for this.
    pub fn sent(&mut self, channel: Channel, sent: Sent) -> bool {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.count(sent);
        let pass = &mut self.pass;
        let busy = match channel {
            Channel::Pages(index) => pass.busy.get_mut(usize::from(index)),
            Channel::Main | Channel::Urgent => None,
        };
        // The connections are busy at the same time: the longest of them is how long the pages took.
        let busy = busy.map_or(sent.busy, |busy| {
            *busy += sent.busy;
            *busy
        });
        pass.sent = Sent {
            normal: pass.sent.normal + sent.normal,
            zero: pass.sent.zero + sent.zero,
            compressed: pass.sent.compressed + sent.compressed,
            saved: pass.sent.saved + sent.saved,
            bytes: pass.sent.bytes + sent.bytes,
            blocks: false,
            busy: pass.sent.busy.max(busy),
        };
        self.in_flight == 0
    }

    /// The driver has sent so many words of a bitmap, from where it was told to.
    pub fn sent_bitmap(&mut self, words: u64, bytes: u64) {
        self.bitmaps.sent(words);
        self.report.bytes.bitmaps += bytes;
    }

    /// The driver has sent control frames, or the package.
    pub fn sent_frame(&mut self, frame: &Frame, bytes: u64) {
        match frame {
            Frame::Switchover(package) => {
                self.report.bytes.device_state += package.machine.len() as u64;
                self.report.bytes.control += bytes.saturating_sub(package.machine.len() as u64);
            }
            _ => self.report.bytes.control += bytes,
        }
    }

    /// The driver has answered a request.
    pub fn sent_urgent(&mut self, sent: Sent) {
        self.count(sent);
    }

    /// The migration's status and pass: what an owner is told of when it changes.
    pub fn stage(&self) -> (Status, u32) {
        let status = match self.state {
            State::Hello | State::Preparing => Status::Setup,
            State::Harvesting | State::Sending | State::PassAck | State::Watching => Status::Active,
            // After a precopy without bitmaps, too: nothing is to come but the destination's words that all is there.
            State::Committed | State::Ending if self.switch_postcopy || !self.bitmaps.is_empty() => Status::PostcopyActive,
            State::Stopping | State::LastPass | State::Switching | State::Committed | State::Ending => Status::Device,
            State::PreSwitchover => Status::PreSwitchover,
            State::Paused => Status::PostcopyPaused,
            State::Reconnecting | State::Comparing => Status::PostcopyRecover,
            State::Ended => self.report.status,
        };
        (status, self.pass.number)
    }

    /// Where the migration stands.
    pub fn progress(&self, now: Duration) -> Progress {
        let (status, _) = self.stage();
        let remaining = self.outgoing.unsent().len();
        let blocks_remaining = self.outgoing.unsent_blocks();
        let layout = &self.config.layout;
        Progress {
            status,
            total_time_ms: if status.is_active() { now } else { Duration::from_micros(self.report.total_us) }.as_millis() as u64,
            setup_time_ms: self.setup_time.as_millis() as u64,
            ram_total: layout.ram().bytes(),
            ram_remaining: (remaining - blocks_remaining) * PAGE_SIZE as u64,
            disk_total: layout.blocks() * COPY_BLOCK,
            disk_remaining: blocks_remaining * COPY_BLOCK,
            normal_pages: self.report.normal_pages,
            zero_pages: self.report.zero_pages,
            postcopy_requests: self.requests,
            pass: self.pass.number,
            dirty_pages_rate: self.report.passes.last().map_or(0, |pass| pass.dirtied_pages * 1_000_000 / pass.duration_us.max(1)),
            bandwidth: self.history().bandwidth().unwrap_or(0.0) as u64,
            bytes: self.report.bytes,
            expected_downtime_ms: self.history().blackout(remaining, &self.goal()).as_millis() as u64,
            reason: self.report.reason.clone(),
            throttle: self.throttle,
            error: self.report.error.clone(),
            ..Progress::default()
        }
    }

    fn count(&mut self, sent: Sent) {
        self.totals.normal += sent.normal;
        self.totals.zero += sent.zero;
        let Report { bytes, normal_pages, zero_pages, normal_blocks, zero_blocks, .. } = &mut self.report;
        let contents = (sent.normal * PAGE_SIZE as u64).saturating_sub(sent.saved);
        let (normal, zero, kind) =
            if sent.blocks { (normal_blocks, zero_blocks, &mut bytes.blocks) } else { (normal_pages, zero_pages, &mut bytes.pages) };
        *normal += sent.normal;
        *zero += sent.zero;
        *kind += contents;
        bytes.control += sent.bytes.saturating_sub(contents);
        self.report.compressed_pages += sent.compressed;
        self.report.compression_saved += sent.saved;
    }

    /// Bytes a second of the pass under way, while really sending; 0 where too little was sent to tell. Compressed contents count with the
    /// bytes that they stand for: that is what the policy needs to know of pages to come.
    pub(super) fn pass_bandwidth(&self) -> u64 {
        let Sent { bytes, saved, busy, .. } = self.pass.sent;
        let bytes = bytes + saved;
        if bytes < MEASURABLE_BYTES || busy.is_zero() { 0 } else { (bytes as f64 / busy.as_secs_f64()) as u64 }
    }

    /// What the policy decides by.
    pub(super) fn history(&self) -> History<'_> {
        History { passes: &self.report.passes, fixed: self.fixed }
    }

    /// What the policy decides for.
    pub(super) fn goal(&self) -> Goal {
        Goal {
            mode: self.config.mode,
            downtime_limit: self.config.downtime_limit,
            switchover_bandwidth: self.switchover_bandwidth.map(|bandwidth| bandwidth.get() as f64),
            postcopy_requested: self.postcopy_requested,
            throttling: self.throttling,
        }
    }
}
