use std::io::Write;

use vm_memory::ByteValued;

use super::*;

fn config(kernel: &Path, cmdline: &str) -> GuestConfig {
    GuestConfig {
        name: "test".into(),
        cpus: 2,
        memory: 0,
        lock_memory: false,
        hugepages: false,
        kernel: kernel.into(),
        initrd: None,
        cmdline: cmdline.into(),
        disks: Vec::new(),
    }
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A bzImage whose kernel is 4 KiB of 0xf4.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 2 * 512];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &255u32.to_le_bytes());
    put(0x258, &0x20_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image.resize(2 * 512 + 4096, 0xf4);
    image
}

fn read<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(ram: &GuestRam, address: u64) -> u32 {
    u32::from_le_bytes(read(ram, address))
}

fn u64_at(ram: &GuestRam, address: u64) -> u64 {
    u64::from_le_bytes(read(ram, address))
}

#[test]
fn bzimage_gets_its_boot_parameters() {
    let (kernel, initrd) = (file(&bzimage()), file(&[0x5a; 5000]));
    let ram = GuestRam::allocate(16 << 20).unwrap();
    let config = GuestConfig { initrd: Some(initrd.path().into()), ..config(kernel.path(), "console=ttyS0") };
    let entry = load(&config, &ram, &[0]).unwrap();
    let params = zero_page::ADDRESS;
    assert_eq!(entry, Entry::Long { rip: 0x10_0200, boot_params: params });
    assert_eq!(read(&ram, 0x10_0000), [0xf4; 16]);
    // Offsets of Documentation/arch/x86/zero-page.rst.
    assert_eq!(u64_at(&ram, params + 0x70), ACPI);
    assert_eq!(read(&ram, ACPI), *b"RSD PTR ");
    assert_eq!(read(&ram, params + 0x202), *b"HdrS");
    assert_eq!(read(&ram, u32_at(&ram, params + 0x228).into()), *b"console=ttyS0\0");
    let initrd = u64::from(u32_at(&ram, params + 0x218));
    assert_eq!((initrd, u32_at(&ram, params + 0x21c)), ((16 << 20) - 8192, 5000));
    assert_eq!(read(&ram, initrd + 4999), [0x5a, 0]);
    assert_eq!(read(&ram, params + 0x1e8), [3]);
    let e820: Vec<(u64, u64, u32)> = (0..3)
        .map(|index| params + 0x2d0 + index * 20)
        .map(|entry| (u64_at(&ram, entry), u64_at(&ram, entry + 8), u32_at(&ram, entry + 16)))
        .collect();
    assert_eq!(e820, [(0, 0x9fc00, 1), (0x9fc00, 0x60400, 2), (0x10_0000, 15 << 20, 1)]);
    // Long mode code segment, and page tables that map 3.5 GiB onto itself.
    assert_eq!(u64_at(&ram, 0x510), 0x00af_9b00_0000_ffff);
    let table = |address: u64, index: u64| u64_at(&ram, (address & !0xfff) + index * 8);
    assert_eq!(table(table(table(0x9000, 0), 3), 256), 0xe000_0000 | 0x83);
}

#[test]
fn memory_beyond_the_hole_is_in_the_map() {
    let ram = GuestRam::allocate((3 << 30) + (64 << 20)).unwrap();
    let last = *memory_map::ranges(&ram).last().unwrap();
    assert_eq!((last.start, last.size, last.kind), (4 << 30, 64 << 20, memory_map::RAM));
    assert_eq!(memory_map::ranges(&ram)[2].size, (3 << 30) - ONE_MIB);
}

/// An ELF file of one segment at 1 MiB, with a PVH note or without.
fn elf(pvh: bool) -> Vec<u8> {
    use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
    let mut header = Elf64_Ehdr { e_entry: 0x10_0010, e_phoff: 64, e_phentsize: 56, e_phnum: 1 + u16::from(pvh), ..Default::default() };
    (header.e_type, header.e_machine) = (2, 62);
    header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let code = Elf64_Phdr { p_type: 1, p_offset: 0x200, p_paddr: 0x10_0000, p_filesz: 0x20, p_memsz: 0x40_0000, ..Default::default() };
    let note = Elf64_Phdr { p_type: 4, p_offset: 0x180, p_filesz: 20, ..Default::default() };
    let mut bytes = [header.as_slice(), code.as_slice(), note.as_slice()].concat();
    bytes.resize(0x180, 0);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        bytes.extend_from_slice(&u32::to_le_bytes(word));
    }
    bytes.resize(0x200, 0);
    bytes.resize(0x220, 0xf4);
    bytes
}

#[test]
fn elf_with_a_pvh_note_gets_start_info() {
    let (kernel, initrd) = (file(&elf(true)), file(b"initrd"));
    let ram = GuestRam::allocate(16 << 20).unwrap();
    let config = GuestConfig { initrd: Some(initrd.path().into()), ..config(kernel.path(), "a=b") };
    let Entry::Pvh { eip: 0x10_0000, start_info } = load(&config, &ram, &[]).unwrap() else { panic!("not PVH") };
    let info = u64::from(start_info);
    assert_eq!((u32_at(&ram, info), u32_at(&ram, info + 4), u32_at(&ram, info + 12)), (0x336e_c578, 1, 1));
    let module = u64_at(&ram, info + 16);
    assert_eq!(u64_at(&ram, module + 8), 6);
    assert_eq!(read(&ram, u64_at(&ram, module)), *b"initrd");
    assert_eq!(read(&ram, u64_at(&ram, info + 24)), *b"a=b\0");
    assert_eq!(u64_at(&ram, info + 32), ACPI);
    let map = u64_at(&ram, info + 40);
    assert_eq!(u32_at(&ram, info + 48), 3);
    assert_eq!((u64_at(&ram, map + 48), u64_at(&ram, map + 56), u32_at(&ram, map + 64)), (0x10_0000, 15 << 20, 1));
    // 32-bit code segment.
    assert_eq!(u64_at(&ram, 0x510), 0x00cf_9b00_0000_ffff);
}

#[test]
fn elf_without_a_note_is_entered_in_long_mode() {
    let kernel = file(&elf(false));
    let ram = GuestRam::allocate(16 << 20).unwrap();
    let entry = load(&config(kernel.path(), ""), &ram, &[]).unwrap();
    assert_eq!(entry, Entry::Long { rip: 0x10_0010, boot_params: zero_page::ADDRESS });
    assert_eq!(read(&ram, zero_page::ADDRESS + 0x202), *b"HdrS");
}

#[test]
fn what_cannot_be_booted_is_named() {
    let ram = GuestRam::allocate(4 << 20).unwrap();
    let message = |config: &GuestConfig| load(config, &ram, &[]).unwrap_err().to_string();
    let missing = message(&config(Path::new("/nonexistent/kernel"), ""));
    assert!(missing.contains("/nonexistent/kernel") && missing.contains("No such file"), "{missing}");
    for bytes in [&b""[..], b"#!", &[0; 4096], b"\x7fELF", &bzimage()[..0x230]] {
        let text = message(&config(file(bytes).path(), ""));
        assert!(text.contains("is not a kernel"), "{text}");
    }
    // An ELF file, but a module, a program without a place of its own, and one for Arm.
    for (offset, value, reason) in [(16, 1, "a program"), (16, 3, "a program"), (18, 183, "not one for x86-64")] {
        let mut other = elf(false);
        other[offset] = value;
        let text = message(&config(file(&other).path(), ""));
        assert!(text.contains("is not a kernel") && text.contains(reason), "{text}");
    }
    let mut old = bzimage();
    old[0x236] = 0;
    assert!(message(&config(file(&old).path(), "")).contains("64-bit entry"));
    let mut big = bzimage();
    big[0x260..0x264].copy_from_slice(&0x100_0000u32.to_le_bytes());
    assert!(message(&config(file(&big).path(), "")).contains("more --memory"));
    let mut long = bzimage();
    long.resize(8 << 20, 0);
    assert!(message(&config(file(&long).path(), "")).contains("more --memory"));
    let kernel = file(&bzimage());
    assert!(message(&config(kernel.path(), &"x".repeat(256))).contains("takes 255"));
    assert!(message(&config(kernel.path(), &"x".repeat(1 << 20))).contains("takes 65535"));
    assert!(message(&config(kernel.path(), "a\0b")).contains("NUL"));
    let initrd = file(&vec![0; 3 << 20]);
    let config = GuestConfig { initrd: Some(initrd.path().into()), ..config(kernel.path(), "") };
    assert!(message(&config).contains("initrd") && message(&config).contains("more --memory"));
    let config = GuestConfig { initrd: Some("/nonexistent/initrd".into()), ..config };
    assert!(message(&config).contains("/nonexistent/initrd"));
}
