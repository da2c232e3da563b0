//! QMP's commands, carried out on the owner.

use std::sync::Arc;

use serde_json::{Value, json};

use super::guest::Guest;
use super::{Message, Vmm, disks, lock, snapshots};
use crate::block::disk::Disk;
use crate::block::io_error::{BlockIoError, ErrorAction, IoStatus};
use crate::migrate::report::Status;
use crate::qmp::command::{Command, Migrate, MigrateContinue, MigrateIncoming, TransactionAction};
use crate::qmp::event::{Event, ShutdownReason};
use crate::qmp::query_migrate::query_migrate;
use crate::qmp::response::{RunState, StatusInfo};
use crate::qmp::{Handler, QmpError};

/// What a command without an answer answers.
pub(super) fn done() -> Result<Value, QmpError> {
    Ok(json!({}))
}

pub(super) fn answer(value: &impl serde::Serialize) -> Result<Value, QmpError> {
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
            Command::QueryBlock => answer(&disks::block_infos(&self.all_disks())),
            Command::QueryNamedBlockNodes(_) => answer(&disks::named_block_nodes(&self.all_disks())),
            Command::BlockDirtyBitmapAdd(add) => self.alone(TransactionAction::BlockDirtyBitmapAdd(add)),
            Command::BlockDirtyBitmapRemove(bitmap) => self.alone(TransactionAction::BlockDirtyBitmapRemove(bitmap)),
            Command::BlockDirtyBitmapClear(bitmap) => self.alone(TransactionAction::BlockDirtyBitmapClear(bitmap)),
            Command::BlockDirtyBitmapEnable(bitmap) => self.alone(TransactionAction::BlockDirtyBitmapEnable(bitmap)),
            Command::BlockDirtyBitmapDisable(bitmap) => self.alone(TransactionAction::BlockDirtyBitmapDisable(bitmap)),
            Command::BlockDirtyBitmapMerge(merge) => self.alone(TransactionAction::BlockDirtyBitmapMerge(merge)),
            Command::Transaction(transaction) => self.transaction(&transaction.actions),
            Command::BlockDirtyBitmapSha256(bitmap) => answer(&disks::bitmap_sha256(&self.all_disks(), &bitmap)?),
            Command::BlockSnapshotAdd(snapshot) => self.alone(TransactionAction::BlockSnapshotAdd(snapshot)),
            Command::BlockSnapshotRemove(snapshot) => snapshots::remove(&self.all_disks(), &snapshot).and_then(|()| done()),
            Command::NbdServerStart(arguments) => self.start_nbd_server(arguments),
            Command::NbdServerStop => self.stop_nbd_server(),
            Command::BlockExportAdd(arguments) => self.add_export(arguments),
            Command::BlockExportDel(arguments) => self.delete_export(&arguments),
            Command::QueryBlockExports => self.query_exports(),
        }
    }
}

pub(super) fn generic(error: impl std::fmt::Display) -> QmpError {
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
        self.all_disks().iter().try_for_each(|disk| disk.acquire()).map_err(|error| error.to_string())
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
        if self.incoming.lost().is_none() && self.incomplete_images().is_some() {
            return Err(QmpError::generic("the guest is here, but not all of its disks: they are still coming from the source"));
        }
        let _ = self.messages.send(Message::Quit(ShutdownReason::HostQmpQuit));
        done()
    }

    /// The images, in words, in which a guest has written and of which not all has come.
    pub fn incomplete_images(&self) -> Option<String> {
        let paths: Vec<_> =
            self.all_disks().iter().filter_map(|disk| disk.incomplete_image()).map(|path| path.display().to_string()).collect();
        (!paths.is_empty()).then(|| paths.join(" and "))
    }

    pub(super) fn all_disks(&self) -> Vec<Arc<Disk>> {
        lock(&self.disks).clone()
    }

    fn alone(&self, action: TransactionAction) -> Result<Value, QmpError> {
        self.transaction(&[action])
    }

    pub(super) fn disk(&self, node: &str) -> Result<Arc<Disk>, QmpError> {
        lock(&self.disks).iter().find(|disk| disk.config().id == node).cloned().ok_or_else(|| QmpError::device_not_found(node))
    }

    fn transaction(&self, actions: &[TransactionAction]) -> Result<Value, QmpError> {
        // Held, so that no guest is handed over meanwhile: what is added behind its bitmaps' back would be lost.
        let guest = lock(&self.guest);
        if let Guest::Taken = *guest {
            return Err(QmpError::generic("a migration is handing the guest over just now; try again in a moment"));
        }
        self.transactions.carry_out(&self.all_disks(), actions).and_then(|()| done())
    }
}
