//! A guest that does what is typed: `p` powers it off, `r` resets it, and every other letter it says again.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::disk::TestDisk;
use super::ferry::Ferry;
use super::lab::{Hardware, Lab};
use super::output::{LIMIT, More, Output};

/// Where the code is loaded.
const CODE: u64 = 1 << 20;
/// Contents, so that there is something to move.
const PAGES: u64 = 4096;
const PAGE: u64 = 4096;

#[rustfmt::skip]
const MACHINE_CODE: [u8; 52] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8 (COM1)
    0xb0, b'b',             // mov al, 'b'
    0xee,                   // out dx, al
    0x66, 0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd (line status)
    0xec,                   // in al, dx
    0xa8, 0x01,             // test al, 1
    0x74, 0xf7,             // jz wait
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec,                   // in al, dx
    0x3c, b'p',             // cmp al, 'p'
    0x74, 0x07,             // je off
    0x3c, b'r',             // cmp al, 'r'
    0x74, 0x0d,             // je reset
    0xee,                   // out dx, al
    0xeb, 0xe7,             // jmp wait
    0x66, 0xba, 0x00, 0x06, // off: mov dx, 0x600 (ACPI sleep control)
    0xb0, 0x34,             // mov al, S5
    0xee,                   // out dx, al
    0xf4,                   // halt: hlt
    0xeb, 0xfd,             // jmp halt
    0x66, 0xba, 0x02, 0x06, // reset: mov dx, 0x602 (ACPI reset)
    0xb0, 0x01,             // mov al, 1
    0xee,                   // out dx, al
    0xf4,                   // halt: hlt
    0xeb, 0xfd,             // jmp halt
];

/// The kernel as an ELF file.
fn kernel() -> Vec<u8> {
    let mut contents = MACHINE_CODE.to_vec();
    for page in 1..=PAGES {
        contents.resize((page * PAGE) as usize, page as u8 | 1);
    }
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64, version 1
    for word in [CODE, 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    elf.extend([0; 4]);
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, readable, writable and executable
    for word in [120, CODE, CODE, contents.len() as u64, contents.len() as u64, PAGE] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(contents);
    elf
}

/// The puppet, wherever it runs.
pub struct Puppet {
    console: Output,
}

impl Puppet {
    /// Boots one.
    pub fn boot(lab: &Lab) -> (Ferry, Self) {
        Self::boot_with(lab, None)
    }

    /// Boots one that has a disk, which it does not touch.
    pub fn boot_with(lab: &Lab, disk: Option<&TestDisk>) -> (Ferry, Self) {
        let path: PathBuf = lab.path("puppet");
        std::fs::write(&path, kernel()).unwrap();
        let mut ferry = lab.run_with(&path, &Hardware { memory: "64M", cpus: 1, disk, ..Hardware::default() }, "", &[]);
        let mut puppet = Puppet { console: ferry.console() };
        puppet.says("b");
        (ferry, puppet)
    }

    /// It has been handed over.
    pub fn moved_to(&mut self, ferry: &mut Ferry) {
        assert_eq!(self.said(), "", "the guest spoke at its old host");
        self.console = ferry.console();
    }

    /// It must say exactly this next.
    pub fn says(&mut self, words: &str) {
        assert_eq!(self.console.wait_for(words), words);
        self.console.bytes.clear();
    }

    /// It is there: it says again what is typed.
    pub fn answers(&mut self, ferry: &mut Ferry) {
        ferry.process.types("x");
        self.says("x");
    }

    /// It is there, but what is typed may be lost to a restart.
    pub fn answers_after_all(&mut self, ferry: &mut Ferry) {
        let deadline = Instant::now() + LIMIT;
        while !self.console.text_so_far().contains('x') {
            assert!(Instant::now() < deadline, "it does not answer");
            ferry.process.types("x");
            self.console.more(Instant::now() + Duration::from_millis(100));
        }
        // Any further answers to the same question.
        while self.console.more(Instant::now() + Duration::from_millis(100)) == More::Bytes {}
        let said = self.said();
        assert!(said.trim_start_matches('b').chars().all(|letter| letter == 'x'), "{said:?}");
    }

    /// Everything it has said since the last that was expected.
    pub fn said(&mut self) -> String {
        let said = self.console.text_so_far();
        self.console.bytes.clear();
        said
    }
}
