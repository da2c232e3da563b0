//! The CMOS real-time clock, as far as a guest reads the time from it. It always tells the host's UTC time, so that only the number of
//! the register that the guest has chosen moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::bus::BusDevice;
use super::{Device, DeviceError, DeviceState};

/// Status register B: 24-hour mode, binary numbers.
const STATUS_B: u8 = 0b110;
/// Status register D: the battery is good.
const STATUS_D: u8 = 0x80;

/// Version of the saved state: the register's number, one byte.
const VERSION: u16 = 1;
/// The top bit of the index port masks NMIs, which nobody sends.
const INDEX_MASK: u8 = 0x7f;

/// Index and data port; clones share the chosen register's number.
#[derive(Clone, Default)]
pub struct Cmos {
    index: Arc<AtomicU8>,
}

impl BusDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let index = self.index.load(Ordering::Relaxed);
        for (port, value) in (offset..).zip(data) {
            *value = if port == 0 { index } else { register(index, now) };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Writes of the data port are not kept.
        if let (0, [index, ..]) = (offset, data) {
            self.index.store(index & INDEX_MASK, Ordering::Relaxed);
        }
    }
}

impl Device for Cmos {
    fn id(&self) -> &str {
        "cmos"
    }

    fn pause(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState { id: self.id().into(), version: VERSION, state: vec![self.index.load(Ordering::Relaxed)] })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), DeviceError> {
        match (state.version, state.state.as_slice()) {
            (VERSION, [index]) if index & !INDEX_MASK == 0 => {
                self.index.store(*index, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(DeviceError::State { id: self.id().into(), reason: "it is no number of a register".into() }),
        }
    }
}

/// Register `index` (MC146818A) at `now`, in seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (days, second) = (now / 86400, now % 86400);
    let (year, month, day) = date(days);
    match index {
        0 => (second % 60) as u8,
        2 => (second / 60 % 60) as u8,
        4 => (second / 3600) as u8,
        // 1970-01-01 was a Thursday; Sunday is 1.
        6 => ((days + 4) % 7 + 1) as u8,
        7 => day,
        8 => month,
        9 => (year % 100) as u8,
        0xb => STATUS_B,
        0xd => STATUS_D,
        0x32 => (year / 100) as u8,
        _ => 0,
    }
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn date(mut days: u64) -> (u64, u8, u8) {
    let is_leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let lengths = [31, if is_leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days as u8 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_time() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let now = 1_709_251_198;
        let read: Vec<u8> = [0x32, 9, 8, 7, 6, 4, 2, 0].iter().map(|index| register(*index, now)).collect();
        assert_eq!(read, [20, 24, 2, 29, 5, 23, 59, 58]);
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(19_782 + 1), (2024, 3, 1));
    }

    #[test]
    fn the_chosen_register_moves() {
        let mut here = Cmos::default();
        here.write(0, &[0x8d]);
        let saved = here.save().unwrap();
        let mut there = Cmos::default();
        there.restore(&saved).unwrap();
        let mut read = [0; 2];
        there.read(0, &mut read);
        assert_eq!(read, [0x0d, STATUS_D]);
        for state in [vec![], vec![0x80], vec![1, 2]] {
            assert!(there.restore(&DeviceState { state, ..saved.clone() }).is_err());
        }
        assert!(there.restore(&DeviceState { version: 2, ..saved }).is_err());
    }
}
