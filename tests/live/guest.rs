//! What a guest says on its console, followed over all its moves: one unbroken story in which nothing is said twice.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::ferry::Ferry;
use super::output::{LIMIT, More, Output};

/// A pagestorm, wherever it runs.
pub struct Guest {
    console: Output,
    /// Bytes of the console already looked at.
    taken: usize,
    /// The beginning of a line whose end has not come, perhaps from the host before.
    line: Vec<u8>,
    heartbeat: Option<(u64, u64)>,
    pub passes: u64,
    /// What `stat` lines say of vCPU 0.
    pub disk_writes: u64,
    /// The lines that begin with `pagestorm:`.
    pub facts: Vec<String>,
    /// Consoles of hosts it has left, which must stay silent.
    left: Vec<Output>,
    finished: bool,
}

impl Guest {
    /// A guest that `ferry` boots.
    pub fn booting_at(ferry: &mut Ferry) -> Self {
        Guest {
            console: ferry.console(),
            taken: 0,
            line: Vec::new(),
            heartbeat: None,
            passes: 0,
            disk_writes: 0,
            facts: Vec::new(),
            left: Vec::new(),
            finished: false,
        }
    }

    /// The guest has been handed over: what the old host's console has is the beginning of what the new one's says.
    pub fn moved_to(&mut self, ferry: &mut Ferry) {
        self.hear_all();
        let old = std::mem::replace(&mut self.console, ferry.console());
        self.left.push(old);
        self.taken = 0;
    }

    /// Waits until every page has been checked after this moment: a check that had begun before does not count.
    pub fn checks_every_page(&mut self) {
        self.hear_all();
        let passes = self.passes + 2;
        self.wait(&format!("verdict ok passes={passes} or more"), |guest| guest.passes >= passes);
    }

    /// Waits for `count` further heartbeats.
    pub fn beats(&mut self, count: u64) {
        self.hear_all();
        let from = self.heartbeat.map_or(0, |(sequence, _)| sequence + 1);
        self.wait("heartbeats", |guest| guest.heartbeat.is_some_and(|(sequence, _)| sequence + 1 >= from + count));
    }

    /// Waits until it has written `count` further disk blocks.
    pub fn writes_blocks(&mut self, count: u64) {
        self.hear_all();
        let enough = self.disk_writes + count;
        self.wait("disk writes", |guest| guest.disk_writes >= enough);
    }

    /// Waits for its last verdict.
    pub fn finishes(&mut self) {
        self.wait("the last verdict", |guest| guest.finished);
    }

    /// Nothing comes for `time`, not even the rest of a line.
    pub fn is_silent_for(&mut self, time: Duration) {
        self.hear_all();
        let more = self.console.more(Instant::now() + time);
        assert_ne!(
            more,
            More::Bytes,
            "the guest must stand still, but says {:?}",
            String::from_utf8_lossy(&self.console.bytes[self.taken..])
        );
    }

    /// Waits until nothing has come for `time`.
    pub fn falls_silent(&mut self, time: Duration) {
        let deadline = Instant::now() + LIMIT;
        while self.console.more(Instant::now() + time) == More::Bytes {
            assert!(Instant::now() < deadline, "the guest goes on and on");
        }
        self.take();
    }

    /// Waits for anything at all.
    pub fn says_something(&mut self, limit: Duration) -> More {
        self.console.more(Instant::now() + limit)
    }

    /// The value of `key` in the first fact that begins with `pagestorm: name`.
    pub fn fact(&self, name: &str, key: &str) -> u64 {
        let start = format!("pagestorm: {name} ");
        let line = self.facts.iter().find(|line| line.starts_with(&start) && words(line).contains_key(key));
        let line = line.unwrap_or_else(|| panic!("no {name} with {key} in {:?}", self.facts));
        number(line, key)
    }

    /// The runs of its pages: first page, guest address, count.
    pub fn segments(&self) -> Vec<(u64, u64, u64)> {
        let segments = self.facts.iter().filter(|fact| fact.starts_with("pagestorm: segment "));
        segments.map(|line| (number(line, "first_page"), number(line, "gpa"), number(line, "pages"))).collect()
    }

    /// Hears what has been said until now.
    pub fn hear_all(&mut self) {
        while self.console.more(Instant::now()) == More::Bytes {}
        self.take();
    }

    fn wait(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds(self) {
            let more = self.console.more(deadline);
            let tail = String::from_utf8_lossy(&self.console.bytes[self.console.bytes.len().saturating_sub(600)..]).into_owned();
            assert_eq!(more, More::Bytes, "waiting for {what}; the console ends with:\n{tail}");
            self.take();
        }
    }

    fn take(&mut self) {
        for byte in self.console.bytes.split_off(self.taken) {
            self.console.bytes.push(byte);
            match byte {
                b'\n' => {
                    let line = String::from_utf8(std::mem::take(&mut self.line)).expect("a console in ASCII");
                    self.hear(line.trim_end());
                }
                _ => self.line.push(byte),
            }
        }
        self.taken = self.console.bytes.len();
    }

    fn hear(&mut self, line: &str) {
        match line.split(' ').next().unwrap_or_default() {
            "hb" => {
                let (sequence, tsc) = (number(line, "seq"), number(line, "tsc"));
                let (expected, before) = self.heartbeat.map_or((0, 0), |(sequence, tsc)| (sequence + 1, tsc));
                assert_eq!(sequence, expected, "a heartbeat is lost or said twice: {line}");
                assert!(tsc > before, "the TSC went from {before} to {tsc}: {line}");
                self.heartbeat = Some((sequence, tsc));
            }
            "stat" => self.disk_writes = self.disk_writes.max(number(line, "disk_writes")),
            "verdict" if line.starts_with("verdict ok ") => {
                let passes = number(line, "passes");
                assert!(passes >= self.passes, "passes went from {} to {passes}", self.passes);
                self.passes = passes;
                self.finished |= line.ends_with("final=1");
            }
            "pagestorm:" if !line.starts_with("pagestorm: error") => self.facts.push(line.into()),
            "" => {}
            _ => panic!("the guest says: {line}\nbefore that: {:?}, passes {}", self.heartbeat, self.passes),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for console in &mut self.left {
            let heard = console.bytes.len();
            while console.more(Instant::now()) == More::Bytes {}
            let more = String::from_utf8_lossy(&console.bytes[heard..]).into_owned();
            if !std::thread::panicking() {
                assert!(more.is_empty(), "a host that the guest had left said {more:?}");
            }
        }
    }
}

fn words(line: &str) -> HashMap<&str, &str> {
    line.split(' ').filter_map(|word| word.split_once('=')).collect()
}

fn number(line: &str, key: &str) -> u64 {
    let text = words(line).remove(key).unwrap_or_else(|| panic!("no {key} in {line:?}"));
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    parsed.unwrap_or_else(|_| panic!("{key} is no number in {line:?}"))
}
