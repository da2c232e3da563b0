//! The subcommands and their arguments.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, ValueEnum};

use super::backup::BackupArguments;
use super::bitmap::BitmapArguments;
use super::export::ExportArguments;
use super::options::{ReceiveOptions, RunOptions};
use super::serial::SerialTarget;
use super::size::Memory;
use super::{bandwidth, disk, duration, size};
use crate::memory::dirty_tracker::TrackerChoice;
use crate::migrate::report::Mode;
use crate::qmp::parameters::{MultifdCompression, Storage};
use crate::vm::config::{DiskConfig, GuestConfig};

/// Run a Linux guest under KVM, and move it to another host while it runs.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, after_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub command: Subcommand,
}

const EXAMPLES: &str = "\
Examples:
  ferry run --kernel vmlinuz --initrd initrd.img --disk path=disk.img,id=root --qmp guest.sock
  ferry receive --listen tcp:0.0.0.0:4444 --qmp guest.sock        (on the other host)
  ferry migrate --qmp guest.sock tcp:other-host:4444

Exit status: 0 done, 1 failed (one sentence on stderr says what), 2 wrong usage.";

#[derive(Debug, clap::Subcommand)]
pub(super) enum Subcommand {
    /// Boot a guest and run it until it powers off or has moved away
    Run(RunArguments),
    /// Wait for a guest from another host and run it
    Receive(ReceiveArguments),
    /// Move a guest to a waiting `ferry receive`
    Migrate(MigrateArguments),
    /// Show whether a guest runs and where its migration stands
    Status(Target),
    /// Pause a guest
    Pause(Target),
    /// Resume a paused guest
    Resume(Target),
    /// Ask a guest to power off, as its power button does
    Powerdown(Target),
    /// The dirty bitmaps of a guest's disks: list, add, remove, clear, enable, disable, merge
    Bitmap(BitmapArguments),
    /// Back up a guest's disk while it runs, in full or what has changed since; restore such backups
    Backup(BackupArguments),
    /// Let NBD clients (nbdcopy, qemu-img, nbdinfo) read a guest's disk while it runs
    Export(ExportArguments),
    /// Cancel a migration; the guest goes on where it is
    Cancel(Target),
    /// Switch a running migration to postcopy now
    StartPostcopy(Target),
    /// Hand the guest over, where a migration with --pause-before-switchover waits
    Continue(Target),
    /// Join the two sides of a postcopy again whose link was lost
    Recover(RecoverArguments),
    /// End a guest and its Ferry at once, without asking the guest
    Quit(Target),
    /// Show what this host can do, and what to do about what it cannot
    Doctor(DoctorArguments),
}

/// A running Ferry.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// Control socket of the running Ferry
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 quiet'
  ferry run --kernel vmlinux --cpus 4 --memory 4G --disk path=/dev/vg/root,id=root --disk path=cd.iso,id=cd,readonly=on
  ferry run --kernel vmlinuz --serial file:guest.log --qmp guest.sock

On the console: Ctrl-A X ends the guest, Ctrl-A H shows help.")]
pub(super) struct RunArguments {
    /// bzImage or ELF kernel (PVH, or 64-bit boot protocol)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    cmdline: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    cpus: u16,
    /// RAM: 512M, 1G; a multiple of 2M
    ///
    /// With lock=on it is never swapped, once all of it is on the host. With hugepages=2M it is made of huge pages that the administrator has
    /// set aside (hugetlb), here and wherever the guest moves.
    #[arg(long, value_name = "SIZE[,lock=on][,hugepages=2M]", default_value = "512M", value_parser = size::parse_memory)]
    memory: Memory,
    /// Raw disk image or block device; may be given several times. A comma in the path is written as two. Options: readonly=on;
    /// cache=none past the host's page cache; discard=ignore keeps the space of what the guest discards; werror=enospc|report|stop and
    /// rerror=report|stop: what a failed write or read does, give the guest an I/O error or pause it (enospc: pause where the storage is full)
    #[arg(long = "disk", value_name = "path=P,id=ID[,OPTION=VALUE]...", value_parser = disk::parse_disk)]
    disks: Vec<DiskConfig>,
    #[command(flatten)]
    host: HostArguments,
    /// Name of the guest, for people
    #[arg(long, value_name = "NAME", default_value = "guest")]
    name: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry receive --listen tcp:0.0.0.0:4444
  ferry receive --listen unix:/run/ferry/in.sock --disk id=root,path=/dev/vg/root --qmp guest.sock

The guest's configuration comes from the source; --disk tells where its disks are on this host, if elsewhere.")]
pub(super) struct ReceiveArguments {
    /// Where to wait for the source: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "URI", value_parser = parse_address)]
    listen: String,
    /// Where the disk with this id is on this host, or where the image of one that is copied is to be made; may be given several times
    #[arg(long = "disk", value_name = "id=ID,path=P", value_parser = disk::parse_mapping)]
    disks: Vec<(String, PathBuf)>,
    #[command(flatten)]
    host: HostArguments,
}

/// What belongs to the host and not to the guest.
#[derive(Debug, Args)]
struct HostArguments {
    /// Serial console: stdio, null, file:PATH or unix:PATH
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    serial: SerialTarget,
    /// Control socket to listen on, for `ferry migrate` and others, and for QEMU's clients
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// How KVM tells which pages the guest changes while it is moved away from here
    #[arg(long, value_enum, default_value = "auto")]
    dirty_tracking: DirtyTrackingArgument,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry migrate --qmp guest.sock tcp:other-host:4444
  ferry migrate --qmp guest.sock tcp:other-host:4444 --mode precopy --downtime 20ms
  ferry migrate --qmp guest.sock tcp:other-host:4444 --max-bandwidth 1Gbit
  ferry migrate --qmp guest.sock unix:/run/ferry/in.sock --report report.json
  ferry migrate --qmp guest.sock tcp:other-host:4444 --storage copy
  ferry migrate --qmp guest.sock tcp:other-host:4444 --dry-run

Shows progress on a terminal, otherwise one JSON line per event on stdout. Ctrl-C cancels the migration.")]
pub(super) struct MigrateArguments {
    /// Control socket of the Ferry that runs the guest
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Where a `ferry receive` waits: tcp:HOST:PORT or unix:PATH
    #[arg(value_name = "URI", value_parser = parse_other_address)]
    pub uri: String,
    /// How RAM moves
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: ModeArgument,
    /// What becomes of the disks
    #[arg(long, value_enum, default_value = "shared")]
    pub storage: StorageArgument,
    /// Downtime that precopy aims for: 50ms, 1s
    #[arg(long, value_name = "TIME", value_parser = duration::parse_milliseconds)]
    pub downtime: Option<i64>,
    /// Limit on background traffic before the switch: 1Gbit, 500Mbit, or bytes a second (125M)
    #[arg(long, value_name = "RATE", value_parser = bandwidth::parse)]
    pub max_bandwidth: Option<i64>,
    /// Limit on background traffic after the switch
    #[arg(long, value_name = "RATE", value_parser = bandwidth::parse)]
    pub postcopy_bandwidth: Option<i64>,
    /// Connections for pages, 1 to 16; by default half as many as there are processors, at most 4, and one below 10 Gbit/s
    #[arg(long, value_name = "N")]
    pub channels: Option<i64>,
    /// Compress pages where that saves time
    #[arg(long, value_enum)]
    pub compression: Option<CompressionArgument>,
    /// In mode precopy, slow the guest down where the migration cannot end otherwise
    ///
    /// Its vCPUs are made to stand still for a growing share of the time, from 20 % up to 99 %, only as far as needed. Mode auto goes to
    /// postcopy instead.
    #[arg(long)]
    pub auto_converge: bool,
    /// When the guest stands still, wait for `ferry continue` before it is handed over; Ctrl-C or `ferry cancel` lets it go on
    #[arg(long)]
    pub pause_before_switchover: bool,
    /// Only tell how long each mode would take and black out; the `ferry receive` waits on
    ///
    /// Connects, has the destination check everything, sends at most 64 MiB to measure the link and watches for three seconds what the
    /// guest writes. Nothing is moved: the guest is not paused, and the destination throws away what it was sent.
    #[arg(long)]
    pub dry_run: bool,
    /// Write what the migration cost to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry recover --qmp guest.sock tcp:other-host:4444           (at the source: the destination still listens there)
  ferry recover --qmp guest.sock --listen tcp:10.0.0.2:5555    (at the destination: listen at another address as well)

At the source it follows the migration to its end, as `ferry migrate` does.")]
pub(super) struct RecoverArguments {
    /// Control socket of the Ferry on this side
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// At the source: where the destination listens, tcp:HOST:PORT or unix:PATH
    #[arg(value_name = "URI", value_parser = parse_other_address, required_unless_present = "listen")]
    pub uri: Option<String>,
    /// At the destination: where to wait for the source, beside the address of `ferry receive`
    #[arg(long, value_name = "URI", value_parser = parse_other_address, conflicts_with_all = ["uri", "report"])]
    pub listen: Option<String>,
    /// Write what the migration cost to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum ModeArgument {
    /// Precopy while it helps, then postcopy
    Auto,
    /// Precopy to the end, never postcopy
    Precopy,
    /// Postcopy at once
    Postcopy,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum StorageArgument {
    /// Both hosts see them
    Shared,
    /// Their contents go along; `ferry receive --disk id=ID,path=PATH` says where to. Read-only disks both hosts must have
    Copy,
}

impl From<StorageArgument> for Storage {
    fn from(storage: StorageArgument) -> Self {
        match storage {
            StorageArgument::Shared => Storage::Shared,
            StorageArgument::Copy => Storage::Copy,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DirtyTrackingArgument {
    /// The log where KVM has manual protect, otherwise the ring
    Auto,
    /// KVM's dirty log
    Log,
    /// KVM's dirty rings
    Ring,
}

impl From<DirtyTrackingArgument> for TrackerChoice {
    fn from(argument: DirtyTrackingArgument) -> Self {
        match argument {
            DirtyTrackingArgument::Auto => TrackerChoice::Auto,
            DirtyTrackingArgument::Log => TrackerChoice::Log,
            DirtyTrackingArgument::Ring => TrackerChoice::Ring,
        }
    }
}

impl From<ModeArgument> for Mode {
    fn from(mode: ModeArgument) -> Self {
        match mode {
            ModeArgument::Auto => Mode::Auto,
            ModeArgument::Precopy => Mode::Precopy,
            ModeArgument::Postcopy => Mode::Postcopy,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum CompressionArgument {
    /// Never
    None,
    /// Fast
    Lz4,
    /// Smaller, and slower
    Zstd,
}

impl From<CompressionArgument> for MultifdCompression {
    fn from(compression: CompressionArgument) -> Self {
        match compression {
            CompressionArgument::None => MultifdCompression::None,
            CompressionArgument::Lz4 => MultifdCompression::Lz4,
            CompressionArgument::Zstd => MultifdCompression::Zstd,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Print the checks as JSON
    #[arg(long)]
    pub json: bool,
}

impl RunArguments {
    /// The options, or the end of the process with a usage error where two disks have the same id.
    pub fn into_options(self) -> RunOptions {
        refuse_duplicates(self.disks.iter().map(|disk| disk.id.as_str()));
        let RunArguments { kernel, initrd, cmdline, cpus, memory, mut disks, host, name } = self;
        disks.iter_mut().for_each(|disk| disk.path = absolute(&disk.path));
        let config = GuestConfig {
            name,
            cpus,
            memory: memory.size,
            lock_memory: memory.lock,
            hugepages: memory.hugepages,
            kernel: absolute(&kernel),
            initrd: initrd.as_deref().map(absolute),
            cmdline,
            disks,
        };
        RunOptions { config, serial: host.serial, qmp: host.qmp, tracker: host.dirty_tracking.into() }
    }
}

impl ReceiveArguments {
    /// The options, or the end of the process with a usage error where an id is mapped twice.
    pub fn into_options(self) -> ReceiveOptions {
        refuse_duplicates(self.disks.iter().map(|(id, _)| id.as_str()));
        let HostArguments { serial, qmp, dirty_tracking } = self.host;
        let disks = self.disks.into_iter().map(|(id, path)| (id, absolute(&path))).collect();
        ReceiveOptions { listen: self.listen, disks, serial, qmp, tracker: dirty_tracking.into() }
    }
}

/// `path` as the guest's configuration has it: it goes along to processes with other working directories.
fn absolute(path: &Path) -> PathBuf {
    // Fails for an empty path alone, or where there is no working directory: opening it says so.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn refuse_duplicates<'a>(ids: impl Iterator<Item = &'a str>) {
    if let Some(id) = disk::duplicate(ids) {
        let message = format!("two disks have the id '{id}'; give each an id of its own");
        Arguments::command().error(ErrorKind::ValueValidation, message).exit();
    }
}

/// Catches slips early; the address itself is resolved by whoever connects.
pub(super) fn parse_address(text: &str) -> Result<String, String> {
    let well_formed = match text.split_once(':') {
        Some(("tcp", address)) => address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()),
        Some(("unix", path)) => !path.is_empty(),
        _ => false,
    };
    if well_formed { Ok(text.to_string()) } else { Err("an address is tcp:HOST:PORT or unix:PATH".into()) }
}

/// As [`parse_address`], for another process to use, whose working directory is another one.
fn parse_other_address(text: &str) -> Result<String, String> {
    let address = parse_address(text)?;
    match address.strip_prefix("unix:") {
        Some(path) => {
            let path = absolute(Path::new(path)).into_os_string().into_string();
            path.map(|path| format!("unix:{path}")).map_err(|_| "the working directory's name is not UTF-8; give the whole path".into())
        }
        None => Ok(address),
    }
}

#[cfg(test)]
mod tests;
