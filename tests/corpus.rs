//! Every parser of bytes from outside, over its regression corpus: the fuzzer's seeds, and the files in `tests/fuzz/corpus` among which every
//! crash ever found stays. `FERRY_WRITE_SEEDS=DIRECTORY` also writes the seeds there, for the fuzzer.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it finds something wrong")]

#[path = "fuzz/entry/mod.rs"]
mod entry;
#[path = "fuzz/seeds.rs"]
mod seeds;

use std::path::{Path, PathBuf};

use entry::{Entry, TARGETS};

/// Runs one input. Panics in threads of devices count as well, so the first panic ends the whole program.
fn run(name: &str, target: Entry, input: &[u8], from: &str) {
    eprintln!("{name}: {from}");
    target(input);
}

fn over_corpus(name: &str) {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
    let (_, target) = *TARGETS.iter().find(|(known, _)| *known == name).expect("a target");
    let seeds = seeds::seeds(name);
    assert!(!seeds.is_empty());
    let directory = std::env::var_os("FERRY_WRITE_SEEDS").map(|root| PathBuf::from(root).join(name));
    for (index, seed) in seeds.iter().enumerate() {
        if let Some(directory) = &directory {
            std::fs::create_dir_all(directory).unwrap();
            std::fs::write(directory.join(format!("seed-{index}")), seed).unwrap();
        }
        run(name, target, seed, &format!("seed {index}"));
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    for file in std::fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display())) {
        let path = file.unwrap().path();
        run(name, target, &std::fs::read(&path).unwrap(), &path.display().to_string());
    }
}

macro_rules! corpora {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            over_corpus(stringify!($name));
        })*

        #[test]
        fn every_target_is_here() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

corpora! { boot command_line destination incremental machine_state nbd nbd_client qmp serial sidecar source virtio_blk virtio_mmio wire }
