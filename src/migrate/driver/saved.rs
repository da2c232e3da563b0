//! What the migration's frames carry of the machine without looking into it: the setup, and the state of the stopped guest. Both begin with
//! a magic number and a version, and what is decoded is hostile input.

use super::owner::MachineSetup;
use crate::memory::PAGE_SIZE;
use crate::vm::MachineState;

const SETUP_MAGIC: &[u8] = b"FRYS";
const GUEST_MAGIC: &[u8] = b"FRYG";
/// Version of both encodings; [`MachineState`] has one of its own.
const VERSION: u16 = 1;

/// Encodes the setup: magic number, version, postcard.
pub fn encode_setup(setup: &MachineSetup) -> Result<Vec<u8>, String> {
    postcard::to_extend(setup, header(SETUP_MAGIC)).map_err(|error| format!("the guest's configuration cannot be encoded: {error}"))
}

/// Decodes a setup for a guest of `ram_pages` pages of RAM.
pub fn decode_setup(bytes: &[u8], ram_pages: u64) -> Result<MachineSetup, String> {
    let setup: MachineSetup = match postcard::take_from_bytes(body(bytes, SETUP_MAGIC, "configuration")?) {
        Ok((setup, [])) => setup,
        _ => return Err("the guest's configuration is damaged".into()),
    };
    let MachineSetup { config, disk_sizes, .. } = &setup;
    if ram_pages.checked_mul(PAGE_SIZE as u64) != Some(config.memory) {
        return Err(format!("the source announced {ram_pages} pages of RAM for a guest of {} bytes", config.memory));
    }
    if disk_sizes.len() != config.disks.len() {
        return Err(format!("the source announced {} disk sizes for {} disks", disk_sizes.len(), config.disks.len()));
    }
    Ok(setup)
}

/// Encodes a stopped guest: magic number, version, whether it ran (0 or 1), the machine's own encoding.
pub fn encode_guest(was_running: bool, state: &MachineState) -> Result<Vec<u8>, String> {
    let mut bytes = header(GUEST_MAGIC);
    bytes.push(was_running.into());
    bytes.extend(state.to_bytes().map_err(|error| format!("the guest's state cannot be encoded: {error}"))?);
    Ok(bytes)
}

/// Decodes a stopped guest.
pub fn decode_guest(bytes: &[u8]) -> Result<(bool, MachineState), String> {
    let (was_running, state) = match body(bytes, GUEST_MAGIC, "state")? {
        [0, state @ ..] => (false, state),
        [1, state @ ..] => (true, state),
        _ => return Err("the guest's state does not tell whether the guest ran".into()),
    };
    Ok((was_running, MachineState::from_bytes(state).map_err(|error| format!("the guest's state: {error}"))?))
}

fn header(magic: &[u8]) -> Vec<u8> {
    [magic, &VERSION.to_le_bytes()].concat()
}

fn body<'a>(bytes: &'a [u8], magic: &[u8], what: &str) -> Result<&'a [u8], String> {
    let body = bytes.strip_prefix(magic).and_then(|rest| rest.strip_prefix(&VERSION.to_le_bytes()));
    body.ok_or_else(|| format!("the guest's {what} is not of version {VERSION}; both sides must run the same version of Ferry"))
}
