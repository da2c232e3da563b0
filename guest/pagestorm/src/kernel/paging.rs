//! Maps the RAM above what `boot.s` maps.

use pagestorm::layout::{Layout, MAPPED_AT_BOOT};

use super::boot::set_page_directory_pointer;

const PRESENT_WRITABLE_USER: u64 = 0x07;
/// Also accessed, dirty, and 2 MiB in size.
const LARGE_PAGE: u64 = 0xe7;
const ENTRIES: u64 = 512;

/// Fills the page directories that the layout has in, and puts them into use. Nothing was mapped there
/// before, so nothing needs flushing.
pub fn map_high_memory(layout: &Layout) {
    let first = MAPPED_AT_BOOT >> 30;
    for index in 0..layout.page_directory_count {
        let directory = layout.page_directories + index * 4096;
        for entry in 0..ENTRIES {
            let frame = ((first + index) << 30) + (entry << 21);
            // SAFETY: the layout gives this page of mapped RAM to page directories alone.
            unsafe {
                (directory as *mut u64)
                    .add(entry as usize)
                    .write_volatile(frame | LARGE_PAGE)
            };
        }
        set_page_directory_pointer((first + index) as usize, directory | PRESENT_WRITABLE_USER);
    }
}
