//! What the migration's frames carry of the machine without looking into it: the setup, and the state of the stopped guest. Both begin with
//! a magic number and a version, and what is decoded is hostile input.

use super::owner::MachineSetup;
use crate::memory::PAGE_SIZE;
use crate::vm::MachineState;
use crate::vm::config::DiskConfig;

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
    // It names a thread and rides in messages.
    if let Some(disk) = config.disks.iter().find(|disk| !DiskConfig::is_id(&disk.id)) {
        return Err(format!("the source announced a disk with the impossible id {:?}", disk.id));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::config::GuestConfig;
    use crate::vm::facts::MachineFacts;

    fn setup(id: &str) -> MachineSetup {
        let disks = vec![DiskConfig { id: id.into(), path: "disk.img".into(), readonly: false }];
        let (name, kernel, initrd, cmdline) = ("guest".into(), "vmlinuz".into(), None, String::new());
        MachineSetup {
            config: GuestConfig { name, cpus: 1, memory: 2 << 20, lock_memory: false, hugepages: false, kernel, initrd, cmdline, disks },
            facts: MachineFacts { cpuid: Vec::new(), cpus: 1, tsc_khz: 1, msrs: Vec::new(), xsave_size: 4096 },
            disk_sizes: vec![512],
        }
    }

    #[test]
    fn a_setup_that_contradicts_itself_or_has_impossible_disks_is_refused() {
        let decode = |setup: &MachineSetup, pages| decode_setup(&encode_setup(setup).unwrap(), pages).map(|setup| setup.disk_sizes);
        assert_eq!(decode(&setup("root"), 512), Ok(vec![512]));
        assert!(decode(&setup("root"), 513).unwrap_err().contains("513 pages"));
        assert!(decode(&MachineSetup { disk_sizes: vec![], ..setup("root") }, 512).unwrap_err().contains("0 disk sizes"));
        for id in ["", "a\0b", "a/b", "a-name-that-is-too-long"] {
            assert!(decode(&setup(id), 512).unwrap_err().contains("impossible id"), "{id:?}");
        }
    }
}
