//! One backup, from its point in time to its file.

use std::io::{BufWriter, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bitmaps::{Names, Point, State};
use super::display::Display;
use super::{BackupError, TakeArguments, copy};
use crate::backup::id::BackupId;
use crate::backup::incremental::{Header, Writer};
use crate::backup::sparse::NewFile;
use crate::block::nbd::catalogue::RemoveMode;
use crate::block::nbd::client::Client as NbdClient;
use crate::cli::export::{self, start_server, stop_server};
use crate::cli::{CliError, format, interrupt};
use crate::migrate::transport::Address;
use crate::qmp::Command;
use crate::qmp::block_export::{BlockExportAdd, BlockExportDel, BlockExportType, ExportedBitmap};
use crate::qmp::client::Client;
use crate::qmp::command::BlockSnapshot;

/// How long the NBD server may take for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Full,
    Incremental,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Full => "full",
            Kind::Incremental => "incremental",
        }
    }
}

/// What was made.
struct Taken {
    id: BackupId,
    size: u64,
    read: u64,
    stored: u64,
}

/// What is to be done.
struct Job<'a> {
    arguments: &'a TakeArguments,
    names: Names,
    kind: Kind,
    address: Address,
}

/// Takes a backup.
pub(super) fn take(arguments: &TakeArguments) -> Result<(), CliError> {
    let began = Instant::now();
    let mut display = Display::new();
    let address = export::address(arguments.listen.as_deref(), &arguments.qmp)?;
    let names = Names { disk: arguments.disk.clone(), bitmap: arguments.bitmap.clone() };
    let mut client = Client::connect(&arguments.qmp)?;
    // Before the guest notices anything.
    let file = NewFile::create(&arguments.to, arguments.force).map_err(|source| write_error(arguments, source))?;
    names.recover(&mut client, RemoveMode::Safe)?;
    let state = names.state(&mut client)?;
    let kind = choose(arguments, &state, &display)?;
    let started = start_server(&mut client, &address)?;
    let taken = Job { arguments, names, kind, address }.take(&mut client, &state, file, &mut display);
    let stopped = stop_server(&mut client, started);
    let Taken { id, size, read, stored } = taken?;
    if let Err(error) = stopped {
        display.note(&format!("the NBD server was not stopped: {error}"));
    }
    let time = began.elapsed();
    let (to, kind) = (&arguments.to, kind.name());
    display.end(
        &json!({ "event": "COMPLETED", "data": { "kind": kind, "file": to, "id": id.to_string(), "size": size, "read": read,
            "stored": stored, "seconds": time.as_secs_f64() } }),
        &format!(
            "{}: {kind} backup of {}, {} read and {} stored in {}",
            to.display(),
            format::bytes(size),
            format::bytes(read),
            format::bytes(stored),
            format::microseconds(time.as_micros() as u64)
        ),
    );
    Ok(())
}

fn choose(arguments: &TakeArguments, state: &State, display: &Display) -> Result<Kind, BackupError> {
    match state.nothing_to_build_on() {
        _ if arguments.full => Ok(Kind::Full),
        None => Ok(Kind::Incremental),
        Some(why) if arguments.incremental => Err(BackupError::NothingToBuildOn { bitmap: arguments.bitmap.clone(), why }),
        Some(why) => {
            if !why.is_empty() {
                display.note(&format!("the backup is a full one{why}"));
            }
            Ok(Kind::Full)
        }
    }
}

fn write_error(arguments: &TakeArguments, source: std::io::Error) -> BackupError {
    BackupError::Write { path: arguments.to.clone(), source }
}

impl Job<'_> {
    /// From the point in time to the file, and the bitmaps as they are to be with it or without it.
    fn take(&self, client: &mut Client, state: &State, file: NewFile, display: &mut Display) -> Result<Taken, CliError> {
        let id = BackupId::random().map_err(BackupError::Random)?;
        let point = self.names.begin(client, state, id)?;
        display.event(&json!({ "event": "BEGUN", "data": { "kind": self.kind.name(), "file": self.arguments.to } }));
        let taken = self.read(client, &point, file, display).map_err(|error| explain(client, error));
        match &taken {
            Ok(taken) => {
                let ended = remove_snapshot(client, &self.names, id).and_then(|()| self.names.end(client, &point, taken.id));
                // While the guest is being moved, say.
                if let Err(error) = ended {
                    let then = "the backup is whole, but the bitmap does not know that yet, and the next backup will be larger";
                    display.note(&format!("{then}: {error}"));
                }
            }
            Err(_) => {
                if let Err(error) = self.names.undo(client, &point) {
                    display.note(&format!("the next backup clears up what this one leaves: {error}"));
                }
            }
        }
        taken
    }

    /// Reads the disk as it was at `point`, until the file is whole.
    fn read(&self, client: &mut Client, point: &Point, file: NewFile, display: &mut Display) -> Result<Taken, CliError> {
        let (name, bitmap) = (Names::snapshot(point.id), self.names.taking(point.id));
        let bitmap = (self.kind == Kind::Incremental).then_some(bitmap);
        let of_disk = |name: &String| ExportedBitmap::OfNode { node: self.names.disk.clone(), name: name.clone() };
        client.execute(&Command::BlockExportAdd(BlockExportAdd {
            kind: BlockExportType::Nbd,
            id: name.clone(),
            node_name: name.clone(),
            name: None,
            description: None,
            writable: false,
            bitmaps: bitmap.iter().map(of_disk).collect(),
        }))?;
        let stream = connect(&self.address).map_err(BackupError::Connect)?;
        let mut export = NbdClient::negotiate(stream, &name, bitmap.as_deref()).map_err(BackupError::from)?;
        let (size, mut read) = (export.size(), 0);
        let go_on = |at: u64, so_far: u64| {
            read = so_far;
            display.progress(at, size, &format!("{} backup, {} read", self.kind.name(), format::bytes(so_far)));
            !interrupt::take()
        };
        let write_error = |source| write_error(self.arguments, source);
        let id = match self.kind {
            Kind::Full => copy::full(&mut export, &file, write_error, go_on)?,
            Kind::Incremental => {
                let (disk, granularity) = (self.names.disk.clone(), point.granularity.into());
                let header = Header { id: point.id, parents: point.parents.clone(), disk, size, granularity };
                let mut writer = Writer::new(BufWriter::new(file.stream()), &header).map_err(write_error)?;
                copy::incremental(&mut export, &mut writer, write_error, go_on)?;
                writer.finish().map_err(write_error)?;
                point.id
            }
        };
        let stored = file.keep().map_err(write_error)?;
        Ok(Taken { id, size, read, stored })
    }
}

trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

fn connect(address: &Address) -> std::io::Result<Box<dyn Stream>> {
    Ok(match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            Box::new(stream)
        }
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port))?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    })
}

fn remove_snapshot(client: &mut Client, names: &Names, id: BackupId) -> Result<(), CliError> {
    let name = Names::snapshot(id);
    client.execute(&Command::BlockExportDel(BlockExportDel { id: name.clone(), mode: RemoveMode::Hard }))?;
    client.execute(&Command::BlockSnapshotRemove(BlockSnapshot { node: names.disk.clone(), name }))?;
    Ok(())
}

/// A snapshot ends where the guest is handed over, and then it says only that it cannot be read any more.
fn explain(client: &mut Client, error: CliError) -> CliError {
    if !matches!(error, CliError::Backup(BackupError::Nbd(_) | BackupError::Connect(_))) {
        return error;
    }
    let mut moved = client.execute(&Command::QueryMigrate).is_ok_and(|migration| is_handed_over(&migration["status"]));
    // What the old host's process said before it ended is still there.
    while let Ok(Some(event)) = client.next_event(Instant::now()) {
        moved |= event.get("event").is_some_and(|name| name == "MIGRATION")
            && event.get("data").is_some_and(|data| is_handed_over(&data["status"]));
    }
    if moved { BackupError::Moved.into() } else { error }
}

fn is_handed_over(status: &Value) -> bool {
    status.as_str().is_some_and(|status| matches!(status, "device" | "completed") || status.starts_with("postcopy"))
}
