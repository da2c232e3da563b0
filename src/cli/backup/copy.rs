//! An export read into a file: only what holds data and is dirty.

use std::io::{self, Read, Write};
use std::ops::Range;

use super::BackupError;
use crate::backup::id::{BackupId, Fingerprint};
use crate::backup::incremental::{Change, Writer};
use crate::backup::sparse::{CLUSTER, NewFile, clusters_with_data, is_zero};
use crate::block::nbd::client::{Client, MAX_READ, RangeKind};

/// What incremental backups read in, in bytes: no export has larger blocks.
const BLOCK: u64 = 4096;

/// Copies all of an export into an image; its id. `go_on` is told how far it is, and how much was read.
pub(super) fn full(
    client: &mut Client<impl Read + Write>,
    image: &NewFile,
    mut write_error: impl FnMut(io::Error) -> BackupError,
    go_on: impl FnMut(u64, u64) -> bool,
) -> Result<BackupId, BackupError> {
    let size = client.size();
    image.set_size(size).map_err(&mut write_error)?;
    let mut fingerprint = Fingerprint::new(size);
    let write = |offset: u64, change: Change<'_>| {
        let Change::Data(bytes) = change else { return Ok(()) };
        for (offset, cluster) in clusters_with_data(bytes, offset) {
            fingerprint.add(cluster, offset);
            image.write_at(cluster, offset).map_err(&mut write_error)?;
        }
        Ok(())
    };
    Walk { client, unit: CLUSTER, done: 0, read: 0, write, go_on, buffer: Vec::new() }.walk()?;
    Ok(fingerprint.id())
}

/// Copies what is dirty of an export.
pub(super) fn incremental(
    client: &mut Client<impl Read + Write>,
    writer: &mut Writer<impl Write>,
    mut write_error: impl FnMut(io::Error) -> BackupError,
    go_on: impl FnMut(u64, u64) -> bool,
) -> Result<(), BackupError> {
    let write = |offset: u64, change: Change<'_>| {
        let change = match change {
            Change::Data(bytes) if is_zero(bytes) => Change::Zeros(bytes.len() as u64),
            change => change,
        };
        writer.change(offset, change).map_err(&mut write_error)
    };
    Walk { client, unit: BLOCK, done: 0, read: 0, write, go_on, buffer: Vec::new() }.walk()
}

struct Walk<'a, S, W, G> {
    client: &'a mut Client<S>,
    /// Reads are of whole units, in bytes, but for the export's end.
    unit: u64,
    /// Everything before was written or need not be; a multiple of `unit`, or the export's end.
    done: u64,
    read: u64,
    write: W,
    go_on: G,
    buffer: Vec<u8>,
}

impl<S, W, G> Walk<'_, S, W, G>
where
    S: Read + Write,
    W: FnMut(u64, Change<'_>) -> Result<(), BackupError>,
    G: FnMut(u64, u64) -> bool,
{
    fn walk(mut self) -> Result<(), BackupError> {
        let (size, mut at) = (self.client.size(), 0);
        while at < size {
            let mut end = at;
            for (range, kind) in self.client.status(at)? {
                end = range.end;
                match kind {
                    RangeKind::Clean => {}
                    RangeKind::Data => self.data(range)?,
                    RangeKind::Zero => self.zeros(range)?,
                }
                self.check(end)?;
            }
            // Requests begin where a block does, which extents need not.
            let aligned = end / self.unit * self.unit;
            at = if end < size && aligned > at { aligned } else { end };
        }
        Ok(())
    }

    fn check(&mut self, at: u64) -> Result<(), BackupError> {
        if (self.go_on)(at, self.read) { Ok(()) } else { Err(BackupError::Interrupted) }
    }

    fn data(&mut self, range: Range<u64>) -> Result<(), BackupError> {
        let end = range.end.next_multiple_of(self.unit).min(self.client.size());
        let mut at = (range.start / self.unit * self.unit).max(self.done);
        while at < end {
            self.buffer.resize((end - at).min(MAX_READ as u64) as usize, 0);
            self.client.read(&mut self.buffer, at)?;
            (self.write)(at, Change::Data(&self.buffer))?;
            at += self.buffer.len() as u64;
            self.read += self.buffer.len() as u64;
            self.done = at;
            self.check(at)?;
        }
        Ok(())
    }

    /// Units that are zeros only in part are read.
    fn zeros(&mut self, range: Range<u64>) -> Result<(), BackupError> {
        let start = range.start.next_multiple_of(self.unit).max(self.done);
        let end = if range.end == self.client.size() { range.end } else { range.end / self.unit * self.unit };
        if start >= end {
            return self.data(range);
        }
        if range.start < start {
            self.data(range.start..range.start + 1)?;
        }
        (self.write)(start, Change::Zeros(end - start))?;
        self.done = end;
        if end < range.end { self.data(end..range.end) } else { Ok(()) }
    }
}
