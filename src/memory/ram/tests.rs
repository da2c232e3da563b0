use vm_memory::Bytes;

use super::*;

#[test]
fn ram_past_the_hole_is_contiguous_on_the_host() {
    let ram = GuestRam::allocate(HOLE_START + 2 * GRANULE).unwrap();
    let high = PageNumber::containing(HOLE_START);
    assert_eq!(ram.guest_address(high), Some(GuestAddress(HOLE_END)));
    assert_eq!(ram.guest_address(PageNumber(high.0 - 1)), Some(GuestAddress(HOLE_START - PAGE_SIZE as u64)));
    assert_eq!(ram.guest_address(PageNumber(ram.pages())), None);

    ram.memory().write_obj(0x5au8, GuestAddress(HOLE_END + 3)).unwrap();
    let host = ram.host_address(PageRun::single(high)).unwrap();
    // SAFETY: the page is mapped and nobody else writes it.
    assert_eq!(unsafe { host.add(3).read_volatile() }, 0x5a);
    assert_eq!(ram.page_at_host_address(host.as_ptr() as usize + 5), Some(high));
    assert_eq!(ram.page_at_host_address(ram.base().as_ptr() as usize - 1), None);
    assert_eq!(ram.host_address(PageRun::new(ram.pages() - 1, 2)), None);
}

#[test]
fn device_writes_are_taken_once() {
    let ram = GuestRam::allocate(HOLE_START + GRANULE).unwrap();
    ram.memory().write_slice(&[1; 2 * PAGE_SIZE], GuestAddress(PAGE_SIZE as u64 + 1)).unwrap();
    ram.memory().write_obj(1u32, GuestAddress(HOLE_END)).unwrap();
    let mut dirty = PageSet::empty(ram.pages());
    ram.take_device_writes(&mut dirty);
    let high = HOLE_START / PAGE_SIZE as u64;
    assert_eq!(dirty.runs().collect::<Vec<_>>(), [PageRun::new(1, 3), PageRun::new(high, 1)]);
    let mut again = PageSet::empty(ram.pages());
    ram.take_device_writes(&mut again);
    assert!(again.is_empty());
}

#[test]
fn odd_sizes_are_refused() {
    for size in [0, 1, GRANULE - 1, GRANULE + PAGE_SIZE as u64, u64::MAX] {
        assert!(matches!(GuestRam::allocate(size), Err(RamError::Size(_))), "{size}");
    }
}

#[test]
fn what_the_host_can_never_hold_is_refused() {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name| memory.lines().find_map(|line| line.strip_prefix(name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap();
    let size = ((kib("MemTotal:") + kib("SwapTotal:")) << 10).next_multiple_of(GRANULE) + GRANULE;
    // 1 is the administrator's word that everything is to be promised.
    let is_refused = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap().trim() != "1";
    let allocated = GuestRam::allocate(size).err();
    assert_eq!(allocated.map(|error| error.to_string().contains("less --memory")), is_refused.then_some(true));
}
