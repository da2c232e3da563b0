//! One test's place: a directory, and the Ferries, disks and migrations in it.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

use super::disk::TestDisk;
use super::ferry::Ferry;
use super::migration::Migration;
use super::pagestorm_kernel;
use super::process::Process;

/// Guests of three tests are as much as a small host can run at a useful speed; most of the time some of them wait.
const AT_A_TIME: usize = 3;

static RUNNING: Mutex<usize> = Mutex::new(0);
static LEFT: Condvar = Condvar::new();

fn running() -> MutexGuard<'static, usize> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits its turn.
struct Turn;

impl Turn {
    fn take() -> Self {
        let mut running = LEFT.wait_while(running(), |running| *running >= AT_A_TIME).unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *running() -= 1;
        LEFT.notify_one();
    }
}

/// What a guest is made of.
#[derive(Clone, Default)]
pub struct Hardware<'a> {
    pub memory: &'a str,
    pub cpus: u32,
    pub disk: Option<&'a TestDisk>,
    pub readonly: bool,
}

pub struct Lab {
    directory: TempDir,
    names: Cell<usize>,
    _turn: Turn,
}

impl Lab {
    pub fn new() -> Self {
        pagestorm_kernel::path();
        let _turn = Turn::take();
        Lab { directory: tempfile::tempdir().unwrap(), names: Cell::new(0), _turn }
    }

    /// A path that nobody has.
    pub fn path(&self, what: &str) -> PathBuf {
        self.names.set(self.names.get() + 1);
        self.directory.path().join(format!("{what}{}", self.names.get()))
    }

    /// A sparse image.
    pub fn disk(&self, bytes: u64) -> TestDisk {
        TestDisk::create(self.path("disk"), bytes)
    }

    /// `ferry run` with pagestorm.
    pub fn run(&self, hardware: &Hardware, cmdline: &str) -> Ferry {
        self.run_with(pagestorm_kernel::path(), hardware, cmdline, &[])
    }

    /// `ferry run` with any kernel and further arguments.
    pub fn run_with(&self, kernel: &Path, hardware: &Hardware, cmdline: &str, more: &[&str]) -> Ferry {
        let qmp = self.path("qmp");
        let mut arguments: Vec<String> =
            ["run", "--kernel", kernel.to_str().unwrap(), "--memory", hardware.memory].map(String::from).to_vec();
        arguments.extend(["--cpus".into(), hardware.cpus.to_string(), "--qmp".into(), qmp.display().to_string()]);
        let cmdline = format!("cpus={} {cmdline}", hardware.cpus);
        arguments.extend(["--cmdline".into(), cmdline]);
        if let Some(disk) = hardware.disk {
            let readonly = if hardware.readonly { ",readonly=on" } else { "" };
            arguments.extend(["--disk".into(), format!("path={},id=root{readonly}", disk.path.display())]);
        }
        arguments.extend(more.iter().map(ToString::to_string));
        Ferry { process: Process::ferry(arguments), qmp, address: String::new() }
    }

    /// `ferry receive`, listening.
    pub fn receive(&self, transport: Transport) -> Ferry {
        self.receive_with(transport, &[])
    }

    /// `ferry receive` with further arguments, listening.
    pub fn receive_with(&self, transport: Transport, more: &[&str]) -> Ferry {
        let qmp = self.path("qmp");
        let listen = match transport {
            Transport::Tcp => "tcp:127.0.0.1:0".into(),
            Transport::Unix => format!("unix:{}", self.path("in").display()),
        };
        let mut process = Process::ferry(["receive", "--listen", &listen, "--qmp", qmp.to_str().unwrap()].iter().chain(more));
        let said = process.stderr.wait_for("\r\n");
        let address = said.lines().find_map(|line| line.split_once("waiting for a guest at ")).expect("the address it listens on").1;
        let address = address.trim().to_string();
        Ferry { process, qmp, address }
    }

    /// `ferry migrate`.
    pub fn migrate(&self, source: &Ferry, address: &str, options: &[&str]) -> Migration {
        let report = self.path("report");
        let fixed = ["migrate", "--qmp", source.qmp.to_str().unwrap(), address, "--report", report.to_str().unwrap()];
        Migration { process: Process::ferry(fixed.iter().chain(options)), report }
    }

    /// `ferry recover` at the source.
    pub fn recover(&self, source: &Ferry, address: &str) -> Migration {
        let report = self.path("report");
        let arguments = ["recover", "--qmp", source.qmp.to_str().unwrap(), address, "--report", report.to_str().unwrap()];
        Migration { process: Process::ferry(arguments), report }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Transport {
    Tcp,
    Unix,
}
