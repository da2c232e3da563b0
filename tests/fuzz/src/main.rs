//! The fuzz targets as one libFuzzer program; `FUZZ_TARGET` says which one runs. See `scripts/fuzz`.

#![no_main]

#[path = "../entry/mod.rs"]
mod entry;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<entry::Entry> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let target = entry::TARGETS.iter().find(|(known, _)| *known == name);
    target.unwrap_or_else(|| panic!("FUZZ_TARGET is none of {:?}", entry::TARGETS.map(|(name, _)| name))).1
});

fuzz_target!(|data: &[u8]| TARGET(data));
