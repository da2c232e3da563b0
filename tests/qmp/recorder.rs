//! A handler that stands in for the guest: a run state and no more.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ferry::migrate::report::{Progress, Report, Status};
use ferry::qmp::capabilities::MigrateCapabilities;
use ferry::qmp::event::{MigrationEvent, ShutdownReason};
use ferry::qmp::parameters::MigrateParameters;
use ferry::qmp::query_migrate::query_migrate;
use ferry::qmp::response::{BlockDirtyInfo, BlockInfo, RunState, StatusInfo};
use ferry::qmp::{Command, Event, Events, Handler, QmpError, Server};
use serde_json::{Value, json};

#[derive(Default)]
struct State {
    stopped: bool,
    quit: bool,
    parameters: MigrateParameters,
    capabilities: MigrateCapabilities,
    bitmaps: Vec<BlockDirtyInfo>,
    progress: Progress,
    report: Option<Report>,
}

/// One disk `d0`, and migrations that are over at once, or to `tcp:nowhere:1` never.
pub struct Recorder {
    events: Events,
    state: Mutex<State>,
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
            Command::QueryBlock => Ok(json!([BlockInfo::new("d0", Path::new("/disk.img"), 1 << 20, false, &state.bitmaps)])),
            Command::BlockDirtyBitmapAdd(add) if add.node == "d0" => {
                let granularity = add.granularity.unwrap_or(65536);
                let recording = !add.disabled;
                state.bitmaps.push(BlockDirtyInfo {
                    name: add.name,
                    count: 0,
                    granularity: granularity.into(),
                    recording,
                    busy: false,
                    persistent: false,
                });
                done
            }
            Command::BlockDirtyBitmapRemove(bitmap) if bitmap.node == "d0" => {
                state.bitmaps.retain(|other| other.name != bitmap.name);
                done
            }
            Command::BlockDirtyBitmapAdd(add) => Err(QmpError::device_not_found(&add.node)),
            other => Err(QmpError::generic(format!("not in this test: {other:?}"))),
        }
    }
}

impl Recorder {
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
        let recorder = Arc::new(Recorder { events: events.clone(), state: Mutex::default() });
        let server = Server::start(&path, recorder.clone(), events.clone()).unwrap();
        Fixture { server, events, path, recorder, _directory: directory }
    }

    pub fn has_quit(&self) -> bool {
        self.recorder.state.lock().unwrap().quit
    }
}
