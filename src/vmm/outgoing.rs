//! Giving the guest to another host: what the migration asks of the owner, and what people ask of the migration.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::guest::Guest;
use super::{Message, Vmm, lock};
use crate::migrate::bitmap_mapping::BitmapMapping;
use crate::migrate::driver::owner::{MachineSetup, SourceOwner, SourceRequest, StoppedGuest};
use crate::migrate::driver::source::SourceMigration;
use crate::migrate::policy::Throttling;
use crate::migrate::report::{Progress, Report, Status};
use crate::migrate::source::Outcome;
use crate::migrate::transport::Address;
use crate::qmp::QmpError;
use crate::qmp::capabilities::{CapabilityStatus, MigrateCapabilities};
use crate::qmp::event::{Event, MigrationEvent};
use crate::qmp::parameters::{MigrateParameters, MigrateSetParameters, Storage};
use crate::vm::facts::MachineFacts;
use crate::vm::{Moved, Vm, VmEvent};

/// How long a migration that is told to end may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How migrations from here go, the one under way, and the last one's end.
#[derive(Default)]
pub(super) struct Outgoing {
    pub parameters: MigrateParameters,
    pub capabilities: MigrateCapabilities,
    migration: Option<Arc<SourceMigration>>,
    active: bool,
    pass: u32,
    last: Option<Report>,
}

fn limit(bytes_per_second: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(bytes_per_second)
}

impl Outgoing {
    /// Takes over what a person changes of the capabilities, also of the migration under way where that can be.
    pub fn set_capabilities(&mut self, changes: &[CapabilityStatus]) -> Result<(), QmpError> {
        self.capabilities.set(changes)?;
        if let Some(migration) = self.migration.as_ref().filter(|_| self.active) {
            migration.set_throttling(self.throttling());
            migration.set_pause_before_switchover(self.capabilities.pause_before_switchover);
        }
        Ok(())
    }

    fn throttling(&self) -> Option<Throttling> {
        self.capabilities.auto_converge.then(|| self.parameters.throttling())
    }
}

impl Vmm {
    /// Begins to move the guest to `uri`.
    pub fn migrate(self: &Arc<Self>, uri: &str) -> Result<(), QmpError> {
        let address: Address = uri.parse().map_err(|error| QmpError::generic(format!("{error}")))?;
        let mut outgoing = lock(&self.outgoing);
        if outgoing.active {
            return Err(QmpError::generic("a migration is under way; wait for it or cancel it"));
        }
        // The source of the last migration may hear that all is here before this side is done with it.
        if self.incoming.is_active() && !self.incoming.is_whole() {
            return Err(QmpError::generic("the guest has not wholly arrived here yet; try again when its migration has completed"));
        }
        let disks = lock(&self.disks).clone();
        let guest = lock(&self.guest);
        let (setup, ram, tracking) = match &*guest {
            Guest::Running(vm) => (setup(vm), vm.ram().clone(), vm.tracking().clone()),
            Guest::Paused(vm) => (setup(vm), vm.ram().clone(), vm.tracking().clone()),
            other => return Err(QmpError::generic(other.why_not("be moved"))),
        };
        drop(guest);
        let (config, facts) = setup;
        let setup = MachineSetup { config, facts, disk_sizes: disks.iter().map(|disk| disk.size()).collect() };
        let parameters = &outgoing.parameters;
        let request = SourceRequest {
            address,
            mode: outgoing.capabilities.mode(parameters.ferry_mode),
            downtime_limit: Duration::from_millis(parameters.downtime_limit),
            max_bandwidth: limit(parameters.max_bandwidth),
            max_postcopy_bandwidth: limit(parameters.max_postcopy_bandwidth),
            pages: parameters.page_transfer(),
            bitmaps: if outgoing.capabilities.dirty_bitmaps { parameters.block_bitmap_mapping.clone() } else { BitmapMapping::none() },
            copy_storage: parameters.ferry_storage == Storage::Copy,
            dry_run: parameters.ferry_dry_run,
            switchover_bandwidth: limit(parameters.avail_switchover_bandwidth),
            throttling: outgoing.throttling(),
            pause_before_switchover: outgoing.capabilities.pause_before_switchover,
        };
        outgoing.last = None;
        outgoing.pass = 0;
        let migration = SourceMigration::start(request, setup, ram, tracking, disks, self.clone()).map_err(QmpError::generic)?;
        outgoing.active = true;
        outgoing.migration = Some(Arc::new(migration));
        Ok(())
    }

    /// Joins a paused postcopy to its destination again, which listens at `uri`.
    pub fn recover_outgoing(&self, uri: &str) -> Result<(), QmpError> {
        let address: Address = uri.parse().map_err(|error| QmpError::generic(format!("{error}")))?;
        self.migration()?.recover(address).map_err(QmpError::generic)
    }

    /// The migration under way.
    pub fn migration(&self) -> Result<Arc<SourceMigration>, QmpError> {
        let outgoing = lock(&self.outgoing);
        outgoing.migration.clone().filter(|_| outgoing.active).ok_or_else(|| QmpError::generic("no migration from here is under way"))
    }

    /// Whether the guest was given up, and its destination has not said that it has all of it: it may need pages from here.
    pub fn is_needed_by_destination(&self) -> bool {
        self.migration().is_ok_and(|migration| migration.is_committed())
    }

    /// Cancels the migration under way, if there is one, and waits until it is over: the guest is back, and the destination and whoever
    /// watches were told. False if it cannot be cancelled any more: the destination needs pages that only this process has, and the link to
    /// it stands.
    pub fn cancel_outgoing(&self) -> bool {
        self.end_outgoing(SourceMigration::cancel)
    }

    /// Ends the migration under way because of what the guest has done, as [`Vmm::cancel_outgoing`] does.
    pub fn guest_ended_outgoing(&self, event: &VmEvent) -> bool {
        self.end_outgoing(|migration| migration.guest_ended(event))
    }

    fn end_outgoing(&self, end: impl FnOnce(&SourceMigration) -> Result<(), String>) -> bool {
        let Ok(migration) = self.migration() else { return true };
        if migration.is_paused() {
            return true;
        }
        let ended = end(&migration).is_ok();
        if ended {
            let outgoing = lock(&self.outgoing);
            let _ = self.outgoing_ended.wait_timeout_while(outgoing, END_LIMIT, |outgoing| outgoing.active);
        }
        // One that completed in between is over as well.
        ended || self.migration().is_err()
    }

    fn outgoing_is_over(&self, report: Report) {
        let mut outgoing = lock(&self.outgoing);
        outgoing.active = false;
        outgoing.last = Some(report.clone());
        self.events.emit(&Event::Migration(MigrationEvent { status: report.status, report: Some(report.into()) }));
        // After the event: whoever waits for the end may end the process.
        drop(outgoing);
        self.outgoing_ended.notify_all();
    }

    /// Changes parameters, also of the migration under way.
    pub fn set_migrate_parameters(&self, changes: &MigrateSetParameters) -> Result<(), QmpError> {
        let mut outgoing = lock(&self.outgoing);
        outgoing.parameters.set(changes)?;
        if let Some(migration) = outgoing.migration.as_ref().filter(|_| outgoing.active) {
            let parameters = &outgoing.parameters;
            migration.set_downtime_limit(Duration::from_millis(parameters.downtime_limit));
            migration.set_max_bandwidth(limit(parameters.max_bandwidth));
            migration.set_max_postcopy_bandwidth(limit(parameters.max_postcopy_bandwidth));
            migration.set_switchover_bandwidth(limit(parameters.avail_switchover_bandwidth));
            migration.set_throttling(outgoing.throttling());
        }
        Ok(())
    }

    /// Where the migration from here stands, and how the last one ended.
    pub fn outgoing_progress(&self) -> (Progress, Option<Report>) {
        let outgoing = lock(&self.outgoing);
        let progress = outgoing.migration.as_ref().map(|migration| migration.progress()).unwrap_or_default();
        (progress, outgoing.last.clone())
    }
}

fn setup<S>(vm: &Vm<S>) -> (crate::vm::config::GuestConfig, MachineFacts) {
    (vm.config().clone(), MachineFacts::of(vm))
}

impl SourceOwner for Vmm {
    fn await_lull(&self) {
        // Others may have the guest meanwhile.
        let lull = lock(&self.guest).lull();
        if let Some(lull) = lull {
            lull.wait();
        }
    }

    fn take(&self) -> Result<StoppedGuest, String> {
        lock(&self.guest).take()
    }

    fn stopped(&self) {
        self.events.emit(&Event::Stop);
    }

    fn put_back(&self, stopped: StoppedGuest) -> Result<(), String> {
        let mut guest = lock(&self.guest);
        guest.put(stopped.vm);
        if stopped.was_running {
            guest.resume().inspect_err(|reason| eprintln!("ferry: {reason}; `ferry resume` tries again\r"))?;
            self.events.emit(&Event::Resume);
        }
        Ok(())
    }

    fn throttle(&self, percent: u8) -> Result<(), String> {
        let throttled = match &*lock(&self.guest) {
            Guest::Running(vm) => vm.throttle(percent),
            Guest::Paused(vm) => vm.throttle(percent),
            // It has ended, or moved.
            Guest::None | Guest::Taken | Guest::Moved { .. } => Ok(()),
        };
        throttled.map_err(|error| format!("cannot slow the guest down: {error}"))
    }

    fn changed(&self, status: Status, pass: u32) {
        // The end is told by itself, with the report.
        if !status.is_active() {
            return;
        }
        if status == Status::PostcopyRecover {
            let _ = self.messages.send(Message::Recovering);
        }
        let mut outgoing = lock(&self.outgoing);
        let new_pass = std::mem::replace(&mut outgoing.pass, pass) < pass;
        drop(outgoing);
        if new_pass {
            self.events.emit(&Event::MigrationPass { pass });
        } else {
            self.events.emit(&Event::Migration(MigrationEvent { status, report: None }));
        }
    }

    fn paused(&self, text: String) {
        // Its RAM is still in the migration's hands.
        *lock(&self.guest) = Guest::Moved { _ram: None };
        let how = "the link to the destination can be repaired: `ferry recover --qmp SOCKET URI`, with an address at which it listens";
        let _ = self.messages.send(Message::Lost(format!("{text}; {how}")));
    }

    fn completed(&self, mut report: Report, copied: Vec<PathBuf>) {
        report.stale_images = copied.iter().map(|path| path.display().to_string()).collect();
        for path in &report.stale_images {
            eprintln!("ferry: {path} is stale: the guest writes to its copy at the destination now\r");
        }
        // Its RAM is still in the migration's hands.
        *lock(&self.guest) = Guest::Moved { _ram: None };
        self.outgoing_is_over(report);
    }

    fn ended(&self, outcome: Outcome, moved: Option<Vm<Moved>>) {
        if let Some(vm) = moved {
            *lock(&self.guest) = Guest::Moved { _ram: Some(vm) };
        }
        match outcome {
            Outcome::Completed(_) => {
                // After the event: who gets this ends the process.
                let _ = self.messages.send(Message::MovedAway);
            }
            Outcome::NotMoved(report) => self.outgoing_is_over(report),
        }
    }
}
