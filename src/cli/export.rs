//! `ferry export`: a disk of a running guest for NBD's clients.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Map, Value};

use super::arguments::parse_address;
use super::{CliError, interrupt};
use crate::block::nbd::catalogue::RemoveMode;
use crate::block::nbd::server::ServerError;
use crate::migrate::transport::Address;
use crate::qmp::Command;
use crate::qmp::block_export::{BlockExportAdd, BlockExportDel, BlockExportType, ExportedBitmap, NbdServerStart, SocketAddress};
use crate::qmp::client::{Client, ClientError};

/// How often to look for Ctrl-C.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ferry export --qmp guest.sock root                            (a unix socket beside the control socket)
  ferry export --qmp guest.sock root --bitmap b0 --listen tcp:127.0.0.1:10809
  nbdcopy 'nbd+unix:///root?socket=/run/guest.sock.nbd' root.img

Prints the address for NBD's clients and goes on until Ctrl-C. What clients read changes while the guest writes. Anybody who reaches a tcp \
address can read the disk, and with --writable write it. There is nothing left to read where the guest has moved away.")]
pub(super) struct ExportArguments {
    /// Control socket of the running Ferry
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Id of the disk
    disk: String,
    /// Where NBD's clients connect: unix:PATH or tcp:HOST:PORT; by default a unix socket beside the control socket
    #[arg(long, value_name = "URI", value_parser = parse_address)]
    listen: Option<String>,
    /// Name of the export; the disk's id by default
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Let clients write
    #[arg(long)]
    writable: bool,
    /// Show what this dirty bitmap has now, as qemu:dirty-bitmap:NAME; may be given several times
    #[arg(long = "bitmap", value_name = "NAME")]
    bitmaps: Vec<String>,
    /// End at once and leave the export there, until `block-export-del` with its name as the id, or the guest's end
    #[arg(long)]
    detach: bool,
}

/// Exports a disk until Ctrl-C.
pub(super) fn export(arguments: ExportArguments) -> Result<(), CliError> {
    let ExportArguments { qmp, disk, listen, name, writable, bitmaps, detach } = arguments;
    let address = address(listen.as_deref(), &qmp)?;
    let name = name.unwrap_or_else(|| disk.clone());
    let id = id(&name);
    let mut client = Client::connect(&qmp)?;
    // Before there is something to remove.
    interrupt::catch().map_err(|source| CliError::Write { what: "a signal handler".into(), source })?;
    let started = start_server(&mut client, &address)?;
    let uri = uri(&address, &name);
    let bitmaps = bitmaps.into_iter().map(ExportedBitmap::Name).collect();
    let (kind, name) = (BlockExportType::Nbd, Some(name));
    let add = BlockExportAdd { kind, id: id.clone(), node_name: disk, name, description: None, writable, bitmaps };
    if let Err(error) = client.execute(&Command::BlockExportAdd(add)) {
        stop_server(&mut client, started)?;
        return Err(error.into());
    }
    println!("{uri}");
    if detach {
        return Ok(());
    }
    while !interrupt::take() {
        let event = client.next_event(Instant::now() + POLL).map_err(|error| CliError::Guest(format!("the export has ended: {error}")))?;
        if let Some(why) = event.and_then(|event| why_ended(&event, &id)) {
            return Err(CliError::Guest(format!("the export has ended: {why}")));
        }
    }
    client.execute(&Command::BlockExportDel(BlockExportDel { id, mode: RemoveMode::Hard }))?;
    stop_server(&mut client, started)
}

/// Why there is nothing left to wait for, if the event tells so.
fn why_ended(event: &Map<String, Value>, id: &str) -> Option<&'static str> {
    let (name, data) = (event.get("event")?.as_str()?, event.get("data")?);
    match name {
        "BLOCK_EXPORT_DELETED" if data["id"] == id => Some("somebody else has removed it"),
        // The old host's process waits for its clients to leave. Only the source of a migration has a report.
        "MIGRATION" if data["status"] == "completed" && data["report"].is_object() => {
            Some("the guest has moved away, and its disk with it")
        }
        _ => None,
    }
}

pub(super) fn address(listen: Option<&str>, qmp: &Path) -> Result<Address, CliError> {
    let address = match listen {
        Some(text) => text.parse().map_err(|error| CliError::Guest(format!("{error}")))?,
        None => {
            let mut path = qmp.as_os_str().to_owned();
            path.push(".nbd");
            Address::Unix(path.into())
        }
    };
    Ok(match address {
        // The server has a working directory of its own.
        Address::Unix(path) => Address::Unix(std::path::absolute(path).map_err(|source| CliError::Guest(format!("{source}")))?),
        tcp => tcp,
    })
}

/// Starts the server; whether it did not run before. One that runs must be at this address.
pub(super) fn start_server(client: &mut Client, address: &Address) -> Result<bool, CliError> {
    let addr = match address.clone() {
        Address::Unix(path) => SocketAddress::Unix { path },
        Address::Tcp { host, port } => SocketAddress::Inet { host, port: port.to_string() },
    };
    match client.execute(&Command::NbdServerStart(NbdServerStart { addr, max_connections: 0 })) {
        Ok(_) => Ok(true),
        Err(ClientError::Command(error)) if error.desc == ServerError::Running.to_string() => {
            let found = match address {
                Address::Unix(path) => std::os::unix::net::UnixStream::connect(path).map(drop),
                Address::Tcp { host, port } => std::net::TcpStream::connect((host.as_str(), *port)).map(drop),
            };
            let elsewhere =
                |_| CliError::Guest(format!("the NBD server runs already, but not at {address}; name its address with --listen"));
            found.map(|()| false).map_err(elsewhere)
        }
        Err(error) => Err(error.into()),
    }
}

/// Stops the server, if it was `started` here and nobody else has exports.
pub(super) fn stop_server(client: &mut Client, started: bool) -> Result<(), CliError> {
    if started
        && client
            .execute(&Command::QueryBlockExports)?
            .as_array()
            .is_none_or(|exports| exports.iter().all(|export| export["shutting-down"] == true))
    {
        client.execute(&Command::NbdServerStop)?;
    }
    Ok(())
}

/// QMP's ids have fewer characters than NBD's names: they begin with a letter, and go on with letters, digits and `-._`.
fn id(name: &str) -> String {
    let allowed = |letter: char| if letter.is_ascii_alphanumeric() || "-._".contains(letter) { letter } else { '-' };
    let id: String = name.chars().map(allowed).collect();
    if id.starts_with(|first: char| first.is_ascii_alphabetic()) { id } else { format!("export-{id}") }
}

/// The address of an export, as NBD's clients take it (doc/uri.md of the NetworkBlockDevice/nbd repository).
fn uri(address: &Address, name: &str) -> String {
    let name = percent_encoded(name.as_bytes());
    match address {
        Address::Unix(path) => {
            use std::os::unix::ffi::OsStrExt;
            format!("nbd+unix:///{name}?socket={}", percent_encoded(path.as_os_str().as_bytes()))
        }
        Address::Tcp { host, port } if host.contains(':') => format!("nbd://[{host}]:{port}/{name}"),
        Address::Tcp { host, port } => format!("nbd://{host}:{port}/{name}"),
    }
}

/// What a URI's path and query can have as it is stays so (RFC 3986, 2.3 and 3.3).
fn percent_encoded(bytes: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    bytes.iter().map(|byte| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_nbd_s_clients_take() {
        let unix = address(Some("unix:/run/my sock"), Path::new("q")).unwrap();
        assert_eq!(uri(&unix, "a b"), "nbd+unix:///a%20b?socket=/run/my%20sock");
        assert_eq!(uri(&"tcp:[::1]:7".parse().unwrap(), "root"), "nbd://[::1]:7/root");
        assert_eq!(uri(&"tcp:host:7".parse().unwrap(), "root"), "nbd://host:7/root");
        assert_eq!(address(None, Path::new("/run/q")).unwrap(), Address::Unix("/run/q.nbd".into()));
    }

    #[test]
    fn ids_are_well_formed() {
        assert_eq!([id("root"), id("0/ä"), id("")], ["root", "export-0--", "export-"]);
    }
}
