//! What the source says about the machine: its needs, before the migration, and its state, at the switch.

use ferry::memory::GuestRam;
use ferry::memory::ram::GRANULE;
use ferry::migrate::driver::owner::MachineSetup;
use ferry::migrate::driver::saved::{MAX_COMPANIONS, decode_guest};
use ferry::vm::facts::HostFacts;
use ferry::vm::hot_pages;
use ferry::vm::state::MachineState;

use super::allocation::{proportionate, within};

pub fn run(data: &[u8]) {
    let state = within(proportionate(data.len()), || MachineState::from_bytes(data));
    if let Ok(state) = state {
        let bytes = state.to_bytes().expect("what was decoded encodes");
        assert!(MachineState::from_bytes(&bytes).is_ok());
        // The source's own guest may have left anything in its registers.
        let ram = GuestRam::allocate(GRANULE).expect("2 MiB");
        assert!(hot_pages(&state, ram.memory(), 64).len() <= 64);
    }
    if let Ok((_, _, companions)) = within(proportionate(data.len()), || decode_guest(data)) {
        assert!(companions.pages.len() <= MAX_COMPANIONS);
    }
    if let Ok(setup) = within(proportionate(data.len()), || postcard::from_bytes::<MachineSetup>(data)) {
        let host = HostFacts { cpuid: Vec::new(), max_cpus: 4, tsc_khz: 1_000_000, tsc_scaling: false, msrs: vec![0x10], xsave_size: 4096 };
        let _ = setup.facts.refusals(&host);
    }
}
