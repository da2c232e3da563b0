use super::provision::Provision;
use super::*;
use crate::memory::ram::GRANULE;
use crate::memory::{GuestRam, HostPage};

#[test]
fn ram_of_hugetlb_pages_is_reserved_and_zero() {
    let _provision = Provision::new(3);
    let ram = GuestRam::allocate_hugetlb(3 * GRANULE).unwrap();
    assert_eq!(ram.host_page(), HostPage::HUGE);
    assert_eq!(ram.base().as_ptr().align_offset(GRANULE as usize), 0);
    for offset in (0..ram.size()).step_by(PAGE_SIZE) {
        // SAFETY: the page is mapped and nobody else uses it.
        assert_eq!(unsafe { ram.base().add(offset as usize).read_volatile() }, 0);
    }
}

#[test]
fn cleared_ram_is_zero_again() {
    let _provision = Provision::new(2);
    let ram = GuestRam::allocate_hugetlb(2 * GRANULE).unwrap();
    // SAFETY: the pages are mapped and nobody else uses them.
    unsafe { ram.base().write_bytes(7, ram.size() as usize) };
    ram.clear().unwrap();
    // SAFETY: as above.
    let last = unsafe { ram.base().add(ram.size() as usize - 1).read_volatile() };
    assert_eq!(last, 0);
}

#[test]
fn a_shortage_is_told_with_what_to_do() {
    // More than fits a process, so that nobody else finds none meanwhile.
    let error = GuestRam::allocate_hugetlb(1 << 47).unwrap_err().to_string();
    assert!(error.contains("cannot allocate 67108864 huge pages of 2 MiB"), "{error}");
    assert!(error.contains(" free; `echo ") && error.contains("/nr_hugepages` as root"), "{error}");

    let shortage = |pool| Shortage { needed: 256, pool, source: rustix::io::Errno::NOMEM }.to_string();
    let told = shortage(Some(Pool { total: 100, free: 30 }));
    assert!(told.contains("this host has 30 free; `echo 326 > "), "{told}");
    assert!(shortage(Some(Pool { total: 300, free: 300 })).contains("not for this process"));
    assert!(shortage(None).contains("do without hugepages=2M"));
}
