//! One backup, from its point in time to its file.

use std::io::{BufWriter, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bitmaps::{Names, Point};
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
    let kind = match (state.nothing_to_build_on(), arguments) {
        (_, TakeArguments { full: true, .. }) => Kind::Full,
        (None, _) => Kind::Incremental,
        (Some(why), TakeArguments { incremental: true, bitmap, .. }) => {
            return Err(BackupError::NothingToBuildOn { bitmap: bitmap.clone(), why }.into());
        }
        (Some(why), _) => {
            if !why.is_empty() {
                display.note(&format!("the backup is a full one{why}"));
            }
            Kind::Full
        }
    };
    let started = start_server(&mut client, &address)?;
    let id = BackupId::random().map_err(BackupError::Random)?;
    let outcome = names.begin(&mut client, &state, id).and_then(|point| {
        display.event(&json!({ "event": "BEGUN", "data": { "kind": kind.name(), "file": arguments.to } }));
        let taken = at(&mut client, arguments, &names, &point, kind, &address, file, &mut display);
        let removed = remove_snapshot(&mut client, &names, id);
        match taken {
            Ok(taken) => {
                // The next backup begins with this where it fails here: while the guest is being moved, say.
                if let Err(error) = removed.and_then(|()| names.end(&mut client, &point, taken.id)) {
                    display.note(&format!(
                        "the backup is whole, but the bitmap does not know that yet, and the next one will be larger: {error}"
                    ));
                }
                Ok(taken)
            }
            Err(error) => {
                let error = explain(&mut client, error);
                if let Err(undone) = names.undo(&mut client, &point) {
                    display.note(&format!("the next backup clears up what this one leaves: {undone}"));
                }
                Err(error)
            }
        }
    });
    // Where this fails, the server is gone, or somebody else's.
    let stopped = stop_server(&mut client, started);
    let Taken { id, size, read, stored } = outcome?;
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

fn write_error(arguments: &TakeArguments, source: std::io::Error) -> BackupError {
    BackupError::Write { path: arguments.to.clone(), source }
}

/// Reads the disk as it was at `point`, until the file is whole.
#[expect(clippy::too_many_arguments, reason = "used once, by `take`")]
fn at(
    client: &mut Client,
    arguments: &TakeArguments,
    names: &Names,
    point: &Point,
    kind: Kind,
    address: &Address,
    file: NewFile,
    display: &mut Display,
) -> Result<Taken, CliError> {
    let (name, bitmap) = (Names::snapshot(point.id), names.taking(point.id));
    let of_disk = ExportedBitmap::OfNode { node: names.disk.clone(), name: bitmap.clone() };
    client.execute(&Command::BlockExportAdd(BlockExportAdd {
        kind: BlockExportType::Nbd,
        id: name.clone(),
        node_name: name.clone(),
        name: None,
        description: None,
        writable: false,
        bitmaps: if kind == Kind::Incremental { vec![of_disk] } else { Vec::new() },
    }))?;
    let stream = connect(address).map_err(BackupError::Connect)?;
    let bitmap = (kind == Kind::Incremental).then_some(bitmap.as_str());
    let mut export = NbdClient::negotiate(stream, &name, bitmap).map_err(BackupError::from)?;
    let (size, mut read) = (export.size(), 0);
    let go_on = |at: u64, so_far: u64| {
        read = so_far;
        display.progress(at, size, &format!("{} backup, {} read", kind.name(), format::bytes(so_far)));
        !interrupt::take()
    };
    let write_error = |source| write_error(arguments, source);
    let id = match kind {
        Kind::Full => copy::full(&mut export, &file, write_error, go_on)?,
        Kind::Incremental => {
            let header = Header {
                id: point.id,
                parents: point.parents.clone(),
                disk: names.disk.clone(),
                size,
                granularity: point.granularity.into(),
            };
            let mut writer = Writer::new(BufWriter::new(file.stream()), &header).map_err(write_error)?;
            copy::incremental(&mut export, &mut writer, write_error, go_on)?;
            writer.finish().map_err(write_error)?;
            point.id
        }
    };
    let stored = file.keep().map_err(write_error)?;
    Ok(Taken { id, size, read, stored })
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
