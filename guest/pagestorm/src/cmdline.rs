//! The kernel command line: `key=value` words; what they mean is described in `main.rs`.

use core::fmt;

use crate::page::PAGE_SIZE;

/// Most vCPUs that pagestorm can use.
pub const MAX_CPUS: u32 = 32;

/// How many pages of RAM to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// All that is left beside the kernel and its tables.
    All,
    /// This many pages.
    Pages(u64),
}

/// Contents of filled pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All zero until first dirtied, random after that.
    Zero,
    /// Bodies that repeat every 64 bytes.
    Compressible,
    /// Bodies that do not compress.
    Random,
}

/// How often something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// As fast as possible.
    Max,
    /// So many times a second; 0 is never.
    PerSecond(u64),
}

/// Which page is dirtied next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Sequential,
    /// Any.
    Random,
    /// 90 % of the writes go to the first 10 % of the pages.
    HotCold,
}

/// What a heartbeat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// A line with a number and the TSC.
    Line,
    /// The byte `.`.
    Byte,
    /// A byte that tells how many pages were dirtied since the last one: [`Heartbeat::writes_byte`].
    Writes,
}

impl Heartbeat {
    /// Most pages that one byte tells of.
    pub const MOST_WRITES: u64 = 127;

    /// The byte for `writes` pages, and how many of them it tells of: 128 and that number, which no text contains.
    pub fn writes_byte(writes: u64) -> (u8, u64) {
        let told = writes.min(Self::MOST_WRITES);
        (128 + told as u8, told)
    }
}

/// How a vCPU with nothing to do waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// In `hlt` until the LAPIC timer fires.
    Halt,
    /// In a loop.
    Spin,
}

/// The whole command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// `fill=`
    pub fill: Fill,
    /// `pattern=`
    pub pattern: Pattern,
    /// `rate=`, pages a second over all vCPUs.
    pub rate: Rate,
    /// `order=`
    pub order: Order,
    /// `verify=`, pages checked per page written.
    pub verify: u64,
    /// `cpus=`
    pub cpus: u32,
    /// `disk=`
    pub disk: bool,
    /// `disk_rate=`, operations a second.
    pub disk_rate: Rate,
    /// `disk_discard=`
    pub disk_discard: bool,
    /// `heartbeat=`, milliseconds; 0 is none.
    pub heartbeat: u64,
    /// `heartbeat_byte=`
    pub heartbeat_byte: Heartbeat,
    /// `stat=`: whether there are counters each second.
    pub stat: bool,
    /// `slow=`, microseconds; 0 is not measured.
    pub slow: u64,
    /// `idle=`
    pub idle: Idle,
    /// `run=`, seconds; 0 is for ever.
    pub run: u64,
    /// `tsc_khz=`
    pub tsc_khz: Option<u64>,
    /// `corrupt=`, number of the page to damage.
    pub corrupt: Option<u64>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            fill: Fill::Pages(16 << 20 >> 12),
            pattern: Pattern::Random,
            rate: Rate::PerSecond(1000),
            order: Order::Sequential,
            verify: 1,
            cpus: 1,
            disk: false,
            disk_rate: Rate::PerSecond(100),
            disk_discard: false,
            heartbeat: 100,
            heartbeat_byte: Heartbeat::Line,
            stat: true,
            slow: 0,
            idle: Idle::Halt,
            run: 0,
            tsc_khz: None,
            corrupt: None,
        }
    }
}

/// Why a command line was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem<'a> {
    /// A word without a known `key=` in front.
    UnknownKey(&'a str),
    /// A known key with a value that it does not take.
    BadValue(&'a str),
}

impl fmt::Display for Problem<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::UnknownKey(word) => write!(f, "unknown_key word={word}"),
            Problem::BadValue(word) => write!(f, "bad_value word={word}"),
        }
    }
}

/// Reads a command line; of a key given twice the last one counts.
///
/// # Errors
/// The first word that is not understood.
pub fn parse(line: &str) -> Result<Config, Problem<'_>> {
    let mut config = Config::default();
    for word in line.split_ascii_whitespace() {
        let (key, value) = word.split_once('=').ok_or(Problem::UnknownKey(word))?;
        set(&mut config, key, value)
            .ok_or(Problem::UnknownKey(word))?
            .ok_or(Problem::BadValue(word))?;
    }
    Ok(config)
}

/// None: no such key. Some(None): it does not take this value.
fn set(config: &mut Config, key: &str, value: &str) -> Option<Option<()>> {
    fn store<T>(place: &mut T, value: Option<T>) -> Option<()> {
        *place = value?;
        Some(())
    }
    let limited = |limit: u64| number(value).filter(|&n| n <= limit);
    Some(match key {
        "fill" => store(&mut config.fill, fill(value)),
        "pattern" => store(
            &mut config.pattern,
            match value {
                "zero" => Some(Pattern::Zero),
                "compressible" => Some(Pattern::Compressible),
                "random" => Some(Pattern::Random),
                _ => None,
            },
        ),
        "rate" => store(&mut config.rate, rate(value)),
        "order" => store(
            &mut config.order,
            match value {
                "sequential" => Some(Order::Sequential),
                "random" => Some(Order::Random),
                "hotcold" => Some(Order::HotCold),
                _ => None,
            },
        ),
        "verify" => store(&mut config.verify, limited(1 << 20)),
        "cpus" => {
            let cpus = limited(MAX_CPUS.into()).filter(|&n| n > 0);
            store(&mut config.cpus, cpus.map(|n| n as u32))
        }
        "disk" => store(&mut config.disk, switch(value)),
        "disk_rate" => store(&mut config.disk_rate, rate(value)),
        "disk_discard" => store(&mut config.disk_discard, switch(value)),
        "heartbeat" => store(&mut config.heartbeat, limited(3_600_000)),
        "heartbeat_byte" => store(
            &mut config.heartbeat_byte,
            match value {
                "off" => Some(Heartbeat::Line),
                "on" => Some(Heartbeat::Byte),
                "writes" => Some(Heartbeat::Writes),
                _ => None,
            },
        ),
        "stat" => store(&mut config.stat, switch(value)),
        "slow" => store(&mut config.slow, limited(1_000_000)),
        "idle" => store(
            &mut config.idle,
            match value {
                "hlt" => Some(Idle::Halt),
                "spin" => Some(Idle::Spin),
                _ => None,
            },
        ),
        "run" => store(&mut config.run, limited(86_400 * 365)),
        "tsc_khz" => {
            let khz = limited(1_000_000_000).filter(|&n| n >= 1000);
            store(&mut config.tsc_khz, khz.map(Some))
        }
        "corrupt" => store(&mut config.corrupt, number(value).map(Some)),
        _ => return None,
    })
}

fn number(value: &str) -> Option<u64> {
    // `parse` would take a leading plus sign as well.
    value
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| value.parse().ok())?
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

fn rate(value: &str) -> Option<Rate> {
    match value {
        "max" => Some(Rate::Max),
        _ => number(value)
            .filter(|&n| n <= 100_000_000)
            .map(Rate::PerSecond),
    }
}

fn fill(value: &str) -> Option<Fill> {
    if value == "all" {
        return Some(Fill::All);
    }
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' => (&value[..value.len() - 1], 10),
        b'M' => (&value[..value.len() - 1], 20),
        b'G' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let bytes = number(digits)?.checked_mul(1 << shift)?;
    let pages = bytes / PAGE_SIZE as u64;
    (pages > 0).then_some(Fill::Pages(pages))
}

#[cfg(test)]
mod tests;
