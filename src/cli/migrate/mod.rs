//! `ferry migrate`: starts a migration, follows it, and tells what it cost.

mod display;
mod table;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::arguments::{MigrateArguments, RecoverArguments};
use super::{CliError, interrupt};
use crate::migrate::report::{Report, Status};
use crate::qmp::Command;
use crate::qmp::capabilities::{Capability, CapabilityStatus};
use crate::qmp::client::{Client, ClientError};
use crate::qmp::command::{Migrate, MigrateIncoming, MigrateSetCapabilities};
use crate::qmp::parameters::MigrateSetParameters;
use crate::qmp::query_migrate::Details;
use display::Display;

/// How often to ask for the progress while no event comes.
const POLL: Duration = Duration::from_millis(200);

/// How a migration ended.
struct End {
    status: Status,
    report: Option<Report>,
    error: Option<String>,
}

/// Moves a guest; returns when it has moved as a whole, or with a sentence about why it has not.
pub(super) fn migrate(arguments: &MigrateArguments) -> Result<(), CliError> {
    let mut client = Client::connect(&arguments.qmp)?;
    client.execute(&Command::MigrateSetParameters(Box::new(MigrateSetParameters {
        downtime_limit: arguments.downtime.map(Into::into),
        max_bandwidth: arguments.max_bandwidth.map(Into::into),
        max_postcopy_bandwidth: arguments.postcopy_bandwidth.map(Into::into),
        multifd_channels: arguments.channels.map(Into::into),
        multifd_compression: arguments.compression.map(Into::into),
        ferry_storage: Some(arguments.storage.into()),
        ferry_mode: Some(arguments.mode.into()),
        ferry_dry_run: Some(arguments.dry_run),
        ..MigrateSetParameters::default()
    })))?;
    let capabilities = [
        CapabilityStatus { capability: Capability::AutoConverge, state: arguments.auto_converge },
        CapabilityStatus { capability: Capability::PauseBeforeSwitchover, state: arguments.pause_before_switchover },
    ];
    client.execute(&Command::MigrateSetCapabilities(MigrateSetCapabilities { capabilities: capabilities.to_vec() }))?;
    let start = Migrate { uri: arguments.uri.clone(), detach: Some(true), resume: false };
    carry_through(client, start, arguments.report.as_deref())
}

/// Joins a migration whose link was lost again: at the source to its end, at the destination by listening.
pub(super) fn recover(arguments: RecoverArguments) -> Result<(), CliError> {
    let mut client = Client::connect(&arguments.qmp)?;
    if let Some(uri) = arguments.listen {
        client.execute(&Command::MigrateRecover(MigrateIncoming { uri }))?;
        return Ok(());
    }
    let start = Migrate { uri: arguments.uri.unwrap_or_default(), detach: Some(true), resume: true };
    carry_through(client, start, arguments.report.as_deref())
}

fn carry_through(mut client: Client, start: Migrate, report_file: Option<&Path>) -> Result<(), CliError> {
    // Before the migration begins, so that at no time Ctrl-C leaves it going on unseen.
    interrupt::catch().map_err(|source| CliError::Write { what: "a signal handler".into(), source })?;
    client.execute(&Command::Migrate(start))?;

    let mut display = Display::new();
    let end = follow(&mut client, &mut display)?;
    display.finish();
    if let Some(report) = &end.report {
        display.table(&table::table(report));
        if let Some(path) = report_file {
            write_report(report, path).map_err(|source| CliError::Write { what: path.display().to_string(), source })?;
        }
    }
    end.into_result()
}

fn follow(client: &mut Client, display: &mut Display) -> Result<End, CliError> {
    let mut last_seen = Status::None;
    let mut cancel_refused = false;
    loop {
        if interrupt::take() {
            if cancel_refused {
                return Err(CliError::Migration("stopped watching; the migration goes on, see `ferry status`".into()));
            }
            match client.execute(&Command::MigrateCancel) {
                Ok(_) => display.note("cancelling the migration"),
                Err(ClientError::Command(error)) => {
                    cancel_refused = true;
                    display.note(&format!("the migration cannot be cancelled any more: {error} (Ctrl-C again stops watching it)"));
                }
                Err(error) => return Err(lost(error, last_seen)),
            }
        }
        let end = match client.next_event(Instant::now() + POLL) {
            Ok(Some(event)) => {
                display.event(&event);
                let end = end_in_event(&event, &mut last_seen);
                if last_seen == Status::PreSwitchover && event.get("event").is_some_and(|event| event == "MIGRATION") {
                    display.note("the guest stands still: `ferry continue` hands it over, `ferry cancel` lets it go on here");
                }
                end
            }
            Ok(None) => poll(client, display, &mut last_seen).map_err(|error| lost(error, last_seen))?,
            Err(error) => return Err(lost(error, last_seen)),
        };
        match end {
            // An event without a report: query-migrate has it, if the process is still there.
            Some(End { status, report: None, error }) => {
                return Ok(poll(client, display, &mut last_seen).ok().flatten().unwrap_or(End { status, report: None, error }));
            }
            Some(end) => return Ok(end),
            None => {}
        }
    }
}

fn end_in_event(event: &Map<String, Value>, last_seen: &mut Status) -> Option<End> {
    if event.get("event")? != "MIGRATION" {
        return None;
    }
    let data = event.get("data")?;
    *last_seen = serde_json::from_value(data.get("status")?.clone()).ok()?;
    let report: Option<Report> = data.get("report").and_then(|report| serde_json::from_value(report.clone()).ok());
    let error = report.as_ref().and_then(|report| report.error.clone());
    // A paused one goes on only when somebody asks for it.
    (!last_seen.is_active() || *last_seen == Status::PostcopyPaused).then_some(End { status: *last_seen, report, error })
}

/// Shows the progress; gives the end if it has come.
fn poll(client: &mut Client, display: &mut Display, last_seen: &mut Status) -> Result<Option<End>, ClientError> {
    let answer = client.execute(&Command::QueryMigrate)?;
    let error = answer["error-desc"].as_str().map(str::to_string);
    match serde_json::from_value(answer["ferry"].clone()) {
        Ok(Details::Progress(progress)) => {
            *last_seen = progress.status;
            display.progress(&progress);
            Ok((progress.status == Status::PostcopyPaused).then_some(End { status: progress.status, report: None, error }))
        }
        Ok(Details::Report(report)) => Ok(Some(End { status: report.status, report: Some(report), error })),
        Err(_) => Ok(None),
    }
}

/// The source's process went away without having said how the migration ended.
fn lost(error: ClientError, last_seen: Status) -> CliError {
    let place = match last_seen {
        Status::PostcopyActive | Status::PostcopyPaused | Status::PostcopyRecover => {
            "the guest had been handed over to the destination, which may miss pages of it"
        }
        Status::Device => "it was about to hand over; ask the destination whether the guest runs there",
        _ => "the guest had not been handed over and ended with the source",
    };
    CliError::Migration(format!("{error} before the migration ended: {place}"))
}

impl End {
    fn into_result(self) -> Result<(), CliError> {
        let default = match self.status {
            Status::Completed => return Ok(()),
            // A dry run has told what it was to tell.
            Status::Cancelled if self.report.as_ref().is_some_and(|report| !report.forecasts.is_empty()) => return Ok(()),
            Status::PostcopyPaused => {
                let what = self.error.unwrap_or_else(|| "the link to the destination is lost".into());
                return Err(CliError::Migration(format!("{what}; `ferry recover` joins the two again")));
            }
            Status::Cancelled => "the migration was cancelled; the guest goes on at the source",
            _ => "the migration failed, and the source did not say why",
        };
        Err(CliError::Migration(self.error.unwrap_or_else(|| default.into())))
    }
}

fn write_report(report: &Report, path: &Path) -> std::io::Result<()> {
    let mut text = serde_json::to_vec_pretty(report)?;
    text.push(b'\n');
    std::fs::File::create(path)?.write_all(&text)
}

#[cfg(test)]
mod tests;
