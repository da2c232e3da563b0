//! The short commands: each is one QMP command to a running Ferry.

use std::path::Path;

use serde_json::Value;

use super::{CliError, format};
use crate::migrate::report::Status;
use crate::qmp::Command;
use crate::qmp::client::Client;
use crate::qmp::command::MigrateContinue;
use crate::qmp::query_migrate::Details;

/// `ferry status`: the guest's state, and where its migration stands if there is or was one.
pub(super) fn status(qmp: &Path) -> Result<(), CliError> {
    let mut client = Client::connect(qmp)?;
    let guest = client.execute(&Command::QueryStatus)?;
    let waiting = &guest["ferry"];
    let waiting = match (waiting["waiting-pages"].as_u64(), waiting["waiting-ms"].as_u64()) {
        (Some(pages), Some(ms)) => {
            format!(", waits for {pages} missing pages, for {} by now", format::microseconds(ms.saturating_mul(1000)))
        }
        _ => String::new(),
    };
    println!("guest      {}{waiting}", guest["status"].as_str().unwrap_or("unknown"));
    if guest["status"] == "io-error" {
        for disk in client.execute(&Command::QueryBlock)?.as_array().into_iter().flatten() {
            let what = match disk["io-status"].as_str() {
                Some("nospace") => "has no room left on its storage",
                Some("failed") => "failed",
                _ => continue,
            };
            println!(
                "disk       {} {what}; the guest is paused, and `ferry resume` lets it try again",
                disk["device"].as_str().unwrap_or("?")
            );
        }
    }
    let migration = client.execute(&Command::QueryMigrate)?;
    let Some(status) = migration["status"].as_str() else { return Ok(()) };
    println!("migration  {status}{}", describe(&migration));
    let details = &migration["ferry"];
    let reason = details["progress"]["reason"].as_str().or(details["report"]["reason"].as_str());
    if let Some(reason) = reason.filter(|reason| !reason.is_empty()) {
        println!("decision   {reason}");
    }
    if let Some(error) = migration["error-desc"].as_str() {
        println!("error      {error}");
    }
    Ok(())
}

fn describe(migration: &Value) -> String {
    match serde_json::from_value(migration["ferry"].clone()) {
        Ok(Details::Progress(progress)) => {
            let remaining = format::bytes(progress.ram_remaining);
            // A destination knows nothing of passes.
            let pass = if progress.pass > 0 { format!(", pass {}", progress.pass) } else { String::new() };
            let disks = match progress.disk_total {
                0 => String::new(),
                total => format!(" of RAM and {} of {} of disks", format::bytes(progress.disk_remaining), format::bytes(total)),
            };
            format!("{pass}, {remaining} of {}{disks} remaining", format::bytes(progress.ram_total))
        }
        Ok(Details::Report(report)) => {
            format!(" after {}, downtime {}", format::microseconds(report.total_us), format::microseconds(report.downtime.total_us))
        }
        Err(_) => String::new(),
    }
}

/// `ferry pause`.
pub(super) fn pause(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::Stop)
}

/// `ferry resume`.
pub(super) fn resume(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::Cont)
}

/// `ferry powerdown`.
pub(super) fn powerdown(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::SystemPowerdown)
}

/// `ferry cancel`.
pub(super) fn cancel(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::MigrateCancel)
}

/// `ferry start-postcopy`.
pub(super) fn start_postcopy(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::MigrateStartPostcopy)
}

/// `ferry continue`.
pub(super) fn continue_switchover(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::MigrateContinue(MigrateContinue { state: Status::PreSwitchover }))
}

/// `ferry quit`.
pub(super) fn quit(qmp: &Path) -> Result<(), CliError> {
    execute(qmp, &Command::Quit)
}

/// Carries out a command whose answer says nothing.
pub(super) fn execute(qmp: &Path, command: &Command) -> Result<(), CliError> {
    Client::connect(qmp)?.execute(command)?;
    Ok(())
}
