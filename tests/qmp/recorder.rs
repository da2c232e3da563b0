//! A handler that stands in for the guest: a run state and no more.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ferry::block::disk::Disk;
use ferry::migrate::report::{Progress, Report, Status};
use ferry::qmp::capabilities::MigrateCapabilities;
use ferry::qmp::command::TransactionAction;
use ferry::qmp::event::{MigrationEvent, ShutdownReason};
use ferry::qmp::parameters::MigrateParameters;
use ferry::qmp::query_migrate::query_migrate;
use ferry::qmp::response::{RunState, StatusInfo};
use ferry::qmp::{Command, Event, Events, Handler, QmpError, Server};
use ferry::vm::config::{DiskConfig, DiskOptions};
use ferry::vmm::disks::{self, Transactions};
use serde_json::{Value, json};

#[derive(Default)]
struct State {
    stopped: bool,
    quit: bool,
    parameters: MigrateParameters,
    capabilities: MigrateCapabilities,
    progress: Progress,
    report: Option<Report>,
}

/// Real disks `d0` and `d1` of 1 MiB and `small` of 64 KiB, and migrations that are over at once, or to `tcp:nowhere:1` never.
pub struct Recorder {
    events: Events,
    state: Mutex<State>,
    disks: Vec<Arc<Disk>>,
    transactions: Transactions,
}

impl Handler for Recorder {
    fn execute(&self, command: Command) -> Result<Value, QmpError> {
        let mut state = self.state.lock().unwrap();
        let done = Ok(json!({}));
        match command {
            Command::QueryStatus => {
                let run_state = if state.stopped { RunState::Paused } else { RunState::Running };
                Ok(json!(StatusInfo::new(run_state, None)))
            }
            Command::Stop => {
                state.stopped = true;
                self.events.emit(&Event::Stop);
                done
            }
            Command::Cont => {
                state.stopped = false;
                self.events.emit(&Event::Resume);
                done
            }
            Command::SystemPowerdown => {
                self.events.emit(&Event::Powerdown);
                done
            }
            Command::Quit => {
                state.quit = true;
                self.events.emit(&Event::Shutdown(ShutdownReason::HostQmpQuit.into()));
                done
            }
            Command::Migrate(arguments) if arguments.uri.starts_with("tcp:") => {
                for status in [Status::Setup, Status::Active] {
                    self.events.emit(&Event::Migration(MigrationEvent { status, report: None }));
                }
                self.events.emit(&Event::MigrationPass { pass: 1 });
                if arguments.uri == "tcp:nowhere:1" {
                    state.progress =
                        Progress { status: Status::Active, pass: 1, ram_total: 4096, ram_remaining: 4096, ..Default::default() };
                } else {
                    self.end(&mut state, Report { status: Status::Completed, total_us: 5000, ..Default::default() });
                }
                done
            }
            Command::MigrateCancel => {
                let error = Some("the migration was cancelled in a test".into());
                self.end(&mut state, Report { status: Status::Cancelled, error, ..Default::default() });
                done
            }
            Command::Migrate(arguments) => Err(QmpError::generic(format!("'{}' is not an address", arguments.uri))),
            Command::QueryMigrate => Ok(query_migrate(&state.progress, state.report.as_ref())),
            Command::MigrateSetParameters(changes) => state.parameters.set(&changes).and(done),
            Command::QueryMigrateParameters => Ok(json!(state.parameters)),
            Command::MigrateSetCapabilities(changes) => state.capabilities.set(&changes.capabilities).and(done),
            Command::QueryMigrateCapabilities => Ok(json!(state.capabilities.list())),
            Command::QueryBlock => Ok(json!(disks::block_infos(&self.disks))),
            Command::QueryNamedBlockNodes(_) => Ok(json!(disks::named_block_nodes(&self.disks))),
            Command::BlockDirtyBitmapAdd(add) => self.transaction(&[TransactionAction::BlockDirtyBitmapAdd(add)]),
            Command::BlockDirtyBitmapRemove(bitmap) => self.transaction(&[TransactionAction::BlockDirtyBitmapRemove(bitmap)]),
            Command::BlockDirtyBitmapClear(bitmap) => self.transaction(&[TransactionAction::BlockDirtyBitmapClear(bitmap)]),
            Command::BlockDirtyBitmapEnable(bitmap) => self.transaction(&[TransactionAction::BlockDirtyBitmapEnable(bitmap)]),
            Command::BlockDirtyBitmapDisable(bitmap) => self.transaction(&[TransactionAction::BlockDirtyBitmapDisable(bitmap)]),
            Command::BlockDirtyBitmapMerge(merge) => self.transaction(&[TransactionAction::BlockDirtyBitmapMerge(merge)]),
            Command::Transaction(transaction) => self.transaction(&transaction.actions),
            Command::BlockDirtyBitmapSha256(bitmap) => disks::bitmap_sha256(&self.disks, &bitmap).map(|hash| json!(hash)),
            other => Err(QmpError::generic(format!("not in this test: {other:?}"))),
        }
    }
}

impl Recorder {
    fn new(directory: &Path, events: Events) -> Self {
        let disk = |(id, size): (&str, u64)| {
            let path = directory.join(id);
            File::create(&path).unwrap().set_len(size).unwrap();
            let disk = Disk::open(DiskConfig { id: id.into(), path, readonly: false, options: DiskOptions::default() }).unwrap();
            disk.acquire().unwrap();
            disk
        };
        let disks = [("d0", 1 << 20), ("d1", 1 << 20), ("small", 1 << 16)].map(disk).to_vec();
        Recorder { events, state: Mutex::default(), disks, transactions: Transactions::default() }
    }

    fn transaction(&self, actions: &[TransactionAction]) -> Result<Value, QmpError> {
        self.transactions.carry_out(&self.disks, actions).map(|()| json!({}))
    }

    fn end(&self, state: &mut State, report: Report) {
        self.events.emit(&Event::Migration(MigrationEvent { status: report.status, report: Some(Box::new(report.clone())) }));
        state.report = Some(report);
    }
}

/// A server with a [`Recorder`] behind it.
pub struct Fixture {
    pub server: Server,
    pub events: Events,
    pub path: PathBuf,
    recorder: Arc<Recorder>,
    _directory: tempfile::TempDir,
}

impl Fixture {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let events = Events::default();
        let recorder = Arc::new(Recorder::new(directory.path(), events.clone()));
        let server = Server::start(&path, recorder.clone(), events.clone()).unwrap();
        Fixture { server, events, path, recorder, _directory: directory }
    }

    /// The guest writes a sector of a disk.
    pub fn write(&self, id: &str, offset: u64) {
        let disk = self.recorder.disks.iter().find(|disk| disk.config().id == id).unwrap();
        disk.io().unwrap().write_zeroes(offset, 512, false).unwrap();
    }

    pub fn has_quit(&self) -> bool {
        self.recorder.state.lock().unwrap().quit
    }
}
