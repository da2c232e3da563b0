//! Dirty bitmaps on their way in. One that cannot be taken is dropped, with a warning: that costs a full backup, where a wrong bitmap would
//! cost data.

use std::sync::Arc;

use crate::block::dirty_bitmap::{BitmapRun, Granularity, IncomingBitmap};
use crate::block::disk::Disk;
use crate::migrate::bitmap_mapping::{BitmapMapping, BitmapName};
use crate::migrate::wire::BitmapInfo;

/// The bitmaps of a package, in its order.
#[derive(Default)]
pub struct IncomingBitmaps(Vec<Option<IncomingBitmap>>);

impl IncomingBitmaps {
    /// Makes room on `disks` for those of the bitmaps that `mapping` expects; returns them and a warning for each that is dropped.
    pub fn new(infos: &[BitmapInfo], disks: &[Arc<Disk>], mapping: &BitmapMapping) -> (Self, Vec<String>) {
        let mut warnings = Vec::new();
        let mut incoming = Vec::new();
        for info in infos {
            let created = create(info, disks, mapping, &mut warnings);
            incoming.push(created.map_err(|reason| warnings.push(dropped(&info.name, &reason))).ok());
        }
        (IncomingBitmaps(incoming), warnings)
    }

    /// Loads words. An error is a warning: the bitmap was dropped.
    pub fn load(&mut self, index: u32, first: u64, run: &BitmapRun) -> Result<(), String> {
        let Some(slot) = self.0.get_mut(index as usize) else { return Ok(()) };
        let Some(bitmap) = slot else { return Ok(()) };
        let warning = bitmap.load(first, run).map_err(|error| dropped(bitmap.name(), &error.to_string()));
        if warning.is_err() {
            *slot = None;
        }
        warning
    }

    /// Completes a bitmap. An error is a warning: the bitmap was dropped.
    pub fn complete(&mut self, index: u32) -> Result<(), String> {
        let Some(bitmap) = self.0.get_mut(index as usize).and_then(Option::take) else { return Ok(()) };
        let name = bitmap.name().to_owned();
        bitmap.complete().map_err(|error| dropped(&name, &error.to_string()))
    }
}

fn create(info: &BitmapInfo, disks: &[Arc<Disk>], mapping: &BitmapMapping, warnings: &mut Vec<String>) -> Result<IncomingBitmap, String> {
    let BitmapName { disk: id, name, transform } = mapping.incoming(&info.disk, &info.name)?;
    let disk = disks.iter().find(|disk| disk.config().id == id).ok_or_else(|| format!("there is no disk {id:?} here"))?;
    let granularity = Granularity::new(info.granularity.into()).map_err(|error| error.to_string())?;
    if info.bits != disk.size().div_ceil(granularity.bytes()) {
        return Err(format!("it has {} bits, which do not fit disk {id}", info.bits));
    }
    let wanted = transform.persistent.unwrap_or(info.flags.persistent);
    let refusal = disk.refuses_persistent().filter(|_| wanted);
    let persistent = wanted && refusal.is_none();
    let incoming = disk.bitmaps().incoming(&name, granularity, info.flags.enabled, persistent).map_err(|error| error.to_string())?;
    if let Some(reason) = refusal {
        warnings.push(format!("dirty bitmap {name:?} is not persistent at the destination: {reason}"));
    }
    Ok(incoming)
}

fn dropped(name: &str, reason: &str) -> String {
    format!("dirty bitmap {name:?} was dropped: {reason}; the next backup must be a full one")
}
