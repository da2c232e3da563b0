//! What the migration's frames carry of the machine without looking into it: the setup, and the state of the stopped guest. Both begin with
//! a magic number and a version, and what is decoded is hostile input.

use serde::{Deserialize, Serialize};

use super::owner::MachineSetup;
use crate::memory::{PAGE_SIZE, PageNumber};
use crate::vm::MachineState;
use crate::vm::config::{DiskConfig, DiskOptions};

const SETUP_MAGIC: &[u8] = b"FRYS";
const GUEST_MAGIC: &[u8] = b"FRYG";
/// Version of the setup. Version 1 ended before the disks' options, and is what is sent where they are all as they were then.
const SETUP_VERSION: u16 = 2;
/// Version of the stopped guest; [`MachineState`] has one of its own. Version 1 had no pages, and is what is sent where there are none.
const GUEST_VERSION: u16 = 2;
/// Most pages that come with a stopped guest: 256 KiB, which a gigabit link takes in 2 ms.
pub const MAX_COMPANIONS: usize = 64;

/// Pages that come with a stopped guest: in postcopy those that it touches first when it goes on, in precopy the last ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Companions<'a> {
    /// At most [`MAX_COMPANIONS`].
    pub pages: Vec<PageNumber>,
    /// A page for each, one after the other.
    #[serde(borrow)]
    pub contents: &'a [u8],
}

/// Encodes the setup: magic number, version, postcard of the setup and of the disks' options.
pub fn encode_setup(setup: &MachineSetup) -> Result<Vec<u8>, String> {
    let options: Vec<DiskOptions> = setup.config.disks.iter().map(|disk| disk.options).collect();
    let encoded = match options.iter().all(|options| *options == DiskOptions::default()) {
        true => postcard::to_extend(setup, header(SETUP_MAGIC, 1)),
        false => postcard::to_extend(&(setup, options), header(SETUP_MAGIC, SETUP_VERSION)),
    };
    encoded.map_err(|error| format!("the guest's configuration cannot be encoded: {error}"))
}

/// Decodes a setup for a guest of `ram_pages` pages of RAM.
pub fn decode_setup(bytes: &[u8], ram_pages: u64) -> Result<MachineSetup, String> {
    let damaged = || String::from("the guest's configuration is damaged");
    let (version, body) = body(bytes, SETUP_MAGIC, SETUP_VERSION, "configuration")?;
    let (mut setup, rest): (MachineSetup, _) = postcard::take_from_bytes(body).map_err(|_| damaged())?;
    let (options, rest) = match version {
        1 => (vec![DiskOptions::default(); setup.config.disks.len()], rest),
        _ => postcard::take_from_bytes::<Vec<DiskOptions>>(rest).map_err(|_| damaged())?,
    };
    if !rest.is_empty() || options.len() != setup.config.disks.len() {
        return Err(damaged());
    }
    for (disk, options) in setup.config.disks.iter_mut().zip(options) {
        disk.options = options;
    }
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

/// Encodes a stopped guest: magic number, version, whether it ran (0 or 1), postcard of [`Companions`], the machine's own encoding. `append`
/// puts the contents of a page to the end of what it is given: they are copied once only, as the guest waits for it.
pub fn encode_guest(
    was_running: bool,
    state: &MachineState,
    pages: &[PageNumber],
    mut append: impl FnMut(PageNumber, &mut Vec<u8>) -> Result<(), String>,
) -> Result<Vec<u8>, String> {
    let cannot = |error| format!("the guest's pages cannot be encoded: {error}");
    let state = state.to_bytes().map_err(|error| format!("the guest's state cannot be encoded: {error}"))?;
    let contents = pages.len() * PAGE_SIZE;
    let mut bytes = Vec::with_capacity(contents + state.len() + 16 * (pages.len() + 2));
    bytes.extend(header(GUEST_MAGIC, if pages.is_empty() { 1 } else { GUEST_VERSION }));
    bytes.push(was_running.into());
    if !pages.is_empty() {
        // A slice is its length and then its elements.
        bytes = postcard::to_extend(&(pages, contents), bytes).map_err(cannot)?;
        for page in pages {
            append(*page, &mut bytes)?;
        }
    }
    bytes.extend(state);
    Ok(bytes)
}

/// Decodes a stopped guest: whether it ran, the machine, its pages.
pub fn decode_guest(bytes: &[u8]) -> Result<(bool, MachineState, Companions<'_>), String> {
    let (version, body) = body(bytes, GUEST_MAGIC, GUEST_VERSION, "state")?;
    let (was_running, rest) = match body {
        [0, rest @ ..] => (false, rest),
        [1, rest @ ..] => (true, rest),
        _ => return Err("the guest's state does not tell whether the guest ran".into()),
    };
    let (companions, state): (Companions<'_>, _) = match version {
        1 => (Companions::default(), rest),
        _ => postcard::take_from_bytes(rest).map_err(|_| "the pages that come with the guest are damaged")?,
    };
    if companions.pages.len() > MAX_COMPANIONS || companions.contents.len() != companions.pages.len() * PAGE_SIZE {
        return Err(format!("{} pages of {} bytes in all came with the guest", companions.pages.len(), companions.contents.len()));
    }
    Ok((was_running, MachineState::from_bytes(state).map_err(|error| format!("the guest's state: {error}"))?, companions))
}

fn header(magic: &[u8], version: u16) -> Vec<u8> {
    [magic, &version.to_le_bytes()].concat()
}

/// The version, from 1 to `newest`, and what comes after it.
fn body<'a>(bytes: &'a [u8], magic: &[u8], newest: u16, what: &str) -> Result<(u16, &'a [u8]), String> {
    let parts = bytes.strip_prefix(magic).and_then(|rest| rest.split_first_chunk::<2>());
    match parts.map(|(version, body)| (u16::from_le_bytes(*version), body)) {
        Some((version, body)) if (1..=newest).contains(&version) => Ok((version, body)),
        _ => Err(format!(
            "the guest's {what} is not of version {newest} or an older one; the destination needs at least the source's version of Ferry"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::config::{CacheMode, DiscardMode, GuestConfig, ReadErrorAction, WriteErrorAction};
    use crate::vm::facts::MachineFacts;

    fn setup(id: &str) -> MachineSetup {
        let disks = vec![DiskConfig { id: id.into(), path: "disk.img".into(), readonly: false, options: DiskOptions::default() }];
        let (name, kernel, initrd, cmdline) = ("guest".into(), "vmlinuz".into(), None, String::new());
        MachineSetup {
            config: GuestConfig { name, cpus: 1, memory: 2 << 20, lock_memory: false, hugepages: false, kernel, initrd, cmdline, disks },
            facts: MachineFacts { cpuid: Vec::new(), cpus: 1, tsc_khz: 1, msrs: Vec::new(), xsave_size: 4096 },
            disk_sizes: vec![512],
        }
    }

    #[test]
    fn options_of_disks_go_along_and_version_1_had_none() {
        let mut sent = setup("root");
        let options = DiskOptions {
            cache: CacheMode::None,
            discard: DiscardMode::Ignore,
            werror: WriteErrorAction::Stop,
            rerror: ReadErrorAction::Stop,
        };
        sent.config.disks[0].options = options;
        let bytes = encode_setup(&sent).unwrap();
        assert_eq!(decode_setup(&bytes, 512).unwrap().config, sent.config);
        let with_version = |version: u16, length: usize| [SETUP_MAGIC, &version.to_le_bytes(), &bytes[6..length]].concat();
        // The count of disks and four bytes of options.
        let old = decode_setup(&with_version(1, bytes.len() - 5), 512).unwrap();
        assert_eq!(old.config.disks[0].options, DiskOptions::default());
        for damaged in [with_version(1, bytes.len()), with_version(2, bytes.len() - 5), with_version(2, bytes.len() - 1)] {
            assert!(decode_setup(&damaged, 512).unwrap_err().contains("damaged"));
        }
        for version in [0, 3] {
            assert!(decode_setup(&with_version(version, bytes.len()), 512).unwrap_err().contains("version 2 or an older one"));
        }
    }

    #[test]
    fn pages_come_with_a_guest_in_whole_numbers() {
        let guest =
            |companions: &Companions<'_>| postcard::to_extend(companions, [header(GUEST_MAGIC, GUEST_VERSION), vec![1]].concat()).unwrap();
        let said = |count: u64, bytes: usize| {
            let pages = (0..count).map(PageNumber).collect();
            decode_guest(&guest(&Companions { pages, contents: &vec![7; bytes] })).unwrap_err()
        };
        assert_eq!(said(2, PAGE_SIZE), "2 pages of 4096 bytes in all came with the guest");
        assert_eq!(said(65, 65 * PAGE_SIZE), "65 pages of 266240 bytes in all came with the guest");
        // The machine's state is missing.
        assert!(said(2, 2 * PAGE_SIZE).starts_with("the guest's state: "));
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
