//! QMP's commands, carried out on the owner.

use std::sync::Arc;

use serde_json::{Value, json};

use super::guest::Guest;
use super::{Message, Vmm, lock};
use crate::block::dirty_bitmap::Granularity;
use crate::block::disk::Disk;
use crate::block::io_error::{BlockIoError, ErrorAction, IoStatus};
use crate::migrate::report::Status;
use crate::qmp::command::{BlockDirtyBitmap, BlockDirtyBitmapAdd, Command, Migrate, MigrateContinue, MigrateIncoming};
use crate::qmp::event::{Event, ShutdownReason};
use crate::qmp::query_migrate::query_migrate;
use crate::qmp::response::{BlockDirtyInfo, BlockInfo, RunState, StatusInfo};
use crate::qmp::{Handler, QmpError};

/// What a command without an answer answers.
fn done() -> Result<Value, QmpError> {
    Ok(json!({}))
}

fn answer(value: &impl serde::Serialize) -> Result<Value, QmpError> {
    serde_json::to_value(value).map_err(|error| QmpError::generic(error.to_string()))
}

impl Handler for Arc<Vmm> {
    fn execute(&self, command: Command) -> Result<Value, QmpError> {
        match command {
            Command::QueryStatus => {
                let status = match lock(&self.guest).run_state() {
                    RunState::Paused if self.disk_waits() => RunState::IoError,
                    status => status,
                };
                answer(&StatusInfo::new(status, self.incoming.waiting()))
            }
            Command::Stop => self.stop(),
            Command::Cont => self.cont(),
            Command::Quit => self.quit(),
            Command::SystemPowerdown => self.power_button().map_err(QmpError::generic).and_then(|()| done()),
            Command::Migrate(Migrate { uri, resume: true, .. }) => self.recover_outgoing(&uri).and_then(|()| done()),
            Command::Migrate(Migrate { uri, .. }) => self.migrate(&uri).and_then(|()| done()),
            Command::MigrateIncoming(_) => {
                Err(QmpError::generic("this Ferry was told at its start where to listen (ferry receive --listen)"))
            }
            Command::MigrateStartPostcopy => self.migration()?.start_postcopy().map_err(QmpError::generic).and_then(|()| done()),
            Command::MigrateCancel => match self.migration() {
                Ok(migration) => migration.cancel().map_err(QmpError::generic).and_then(|()| done()),
                Err(_) if self.incoming.is_active() => self.incoming.give_up_rest().map_err(QmpError::generic).and_then(|()| done()),
                // As in QEMU, cancelling what does not go on is no error.
                Err(_) => done(),
            },
            Command::MigrateContinue(MigrateContinue { state: Status::PreSwitchover }) => {
                self.migration()?.continue_switchover().map_err(QmpError::generic).and_then(|()| done())
            }
            Command::MigrateContinue(_) => Err(QmpError::generic("only a migration in state 'pre-switchover' waits to be continued")),
            Command::MigratePause => match self.migration() {
                Ok(migration) => migration.pause(),
                Err(_) => self.incoming.pause(),
            }
            .map_err(QmpError::generic)
            .and_then(|()| done()),
            Command::MigrateRecover(MigrateIncoming { uri }) => {
                self.incoming.recover(&uri).map_err(QmpError::generic).and_then(|()| done())
            }
            Command::QueryMigrate => {
                let (progress, report) = self.outgoing_progress();
                let outgoing = query_migrate(&progress, report.as_ref());
                Ok(match self.incoming.progress() {
                    Some(incoming) if outgoing == json!({}) => query_migrate(&incoming, None),
                    _ => outgoing,
                })
            }
            Command::MigrateSetCapabilities(arguments) => {
                lock(&self.outgoing).set_capabilities(&arguments.capabilities).and_then(|()| done())
            }
            Command::QueryMigrateCapabilities => answer(&lock(&self.outgoing).capabilities.list()),
            Command::MigrateSetParameters(changes) => self.set_migrate_parameters(&changes).and_then(|()| done()),
            Command::QueryMigrateParameters => answer(&lock(&self.outgoing).parameters),
            Command::QueryBlock => answer(&lock(&self.disks).iter().map(|disk| block_info(disk)).collect::<Vec<_>>()),
            Command::BlockDirtyBitmapAdd(arguments) => self.add_bitmap(&arguments),
            Command::BlockDirtyBitmapRemove(BlockDirtyBitmap { node, name }) => {
                self.disk(&node)?.bitmaps().remove(&name).map_err(generic).and_then(|()| done())
            }
            Command::BlockDirtyBitmapClear(BlockDirtyBitmap { node, name }) => {
                self.disk(&node)?.bitmaps().clear(&name).map_err(generic).and_then(|()| done())
            }
            Command::BlockDirtyBitmapEnable(BlockDirtyBitmap { node, name }) => {
                self.disk(&node)?.bitmaps().set_enabled(&name, true).map_err(generic).and_then(|()| done())
            }
            Command::BlockDirtyBitmapDisable(BlockDirtyBitmap { node, name }) => {
                self.disk(&node)?.bitmaps().set_enabled(&name, false).map_err(generic).and_then(|()| done())
            }
            Command::BlockSnapshotAdd(snapshot) => {
                let disks = lock(&self.disks).clone();
                self.snapshots.add(&disks, &snapshot).and_then(|()| done())
            }
            Command::BlockSnapshotRemove(snapshot) => {
                let disks = lock(&self.disks).clone();
                self.snapshots.remove(&disks, &snapshot).and_then(|()| done())
            }
        }
    }
}

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

impl Vmm {
    /// Presses the guest's power button.
    pub fn power_button(&self) -> Result<(), String> {
        lock(&self.guest).power_button()?;
        self.events.emit(&Event::Powerdown);
        Ok(())
    }

    /// Locks every disk's image, which a paused guest that has just arrived does not yet have.
    pub fn own_disks(&self) -> Result<(), String> {
        lock(&self.disks).iter().try_for_each(|disk| disk.acquire()).map_err(|error| error.to_string())
    }

    /// Whether a disk waits for the guest to be resumed.
    fn disk_waits(&self) -> bool {
        lock(&self.disks).iter().any(|disk| disk.io_status() != IoStatus::Ok)
    }

    /// Tells of a disk's failure, and pauses the guest if that is what is to be done.
    pub fn disk_failed(&self, error: BlockIoError) {
        let (id, reason, action) = (error.device.clone(), error.reason.clone(), error.action);
        // Before STOP, as in QEMU.
        self.events.emit(&Event::BlockIoError(error));
        if action == ErrorAction::Report {
            return;
        }
        let mut guest = lock(&self.guest);
        // A guest that was resumed meanwhile has tried again; one that a migration has stopped tries again where it goes on.
        if !matches!(*guest, Guest::Running(_)) || !self.disk_waits() {
            return;
        }
        match guest.pause() {
            Ok(_) => {
                self.events.emit(&Event::Stop);
                eprintln!("ferry: disk {id} failed: {reason}; the guest is paused, and `ferry resume` lets it try again\r");
            }
            Err(refusal) => eprintln!("ferry: disk {id} failed: {reason}; {refusal}\r"),
        }
    }

    fn stop(&self) -> Result<Value, QmpError> {
        if lock(&self.guest).pause().map_err(QmpError::generic)? {
            self.events.emit(&Event::Stop);
        }
        done()
    }

    fn cont(&self) -> Result<Value, QmpError> {
        let mut guest = lock(&self.guest);
        // Only a guest that is here may have its disks.
        if guest.config().is_some() {
            self.own_disks().map_err(QmpError::generic)?;
        }
        if guest.resume().map_err(QmpError::generic)? {
            self.events.emit(&Event::Resume);
        }
        done()
    }

    /// Ends the process, unless the destination of a migration still needs pages from here.
    fn quit(&self) -> Result<Value, QmpError> {
        // While the link is lost it is for a person to judge whether the rest will ever be wanted.
        if self.migration().is_ok_and(|migration| migration.is_committed() && !migration.is_paused()) {
            return Err(QmpError::generic("the guest has moved, but not all of it: its destination still needs pages from here"));
        }
        let _ = self.messages.send(Message::Quit(ShutdownReason::HostQmpQuit));
        done()
    }

    fn disk(&self, node: &str) -> Result<Arc<Disk>, QmpError> {
        lock(&self.disks).iter().find(|disk| disk.config().id == node).cloned().ok_or_else(|| QmpError::device_not_found(node))
    }

    fn add_bitmap(&self, arguments: &BlockDirtyBitmapAdd) -> Result<Value, QmpError> {
        let disk = self.disk(&arguments.node)?;
        if arguments.persistent {
            return Err(QmpError::generic("a raw image has no place for a persistent bitmap; leave `persistent` out"));
        }
        let granularity = match arguments.granularity {
            Some(bytes) => Granularity::new(bytes.into()).map_err(generic)?,
            None => Granularity::default(),
        };
        disk.bitmaps().add(&arguments.name, granularity, !arguments.disabled).map_err(generic)?;
        done()
    }
}

fn block_info(disk: &Disk) -> BlockInfo {
    let bitmaps = disk.bitmaps().info();
    let bitmaps: Vec<_> = bitmaps
        .into_iter()
        .map(|bitmap| BlockDirtyInfo {
            name: bitmap.name,
            count: bitmap.count,
            granularity: bitmap.granularity.bytes(),
            recording: bitmap.recording,
            busy: bitmap.busy,
            persistent: false,
        })
        .collect();
    let config = disk.config();
    BlockInfo::new(&config.id, &config.path, disk.size(), config.readonly, &bitmaps).with_io_status(disk.io_status())
}
