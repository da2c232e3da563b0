use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const KERNEL_END: u64 = MIB + 12345;

fn low(end: u64) -> [Region; 2] {
    [
        Region {
            start: 0,
            end: 0x9fc00,
        },
        Region { start: MIB, end },
    ]
}

/// Everything that the layout gives out, as (start, end).
fn pieces(layout: &Layout, disk_blocks: u64) -> Vec<(u64, u64)> {
    let mut pieces = vec![
        (layout.page_directories, layout.page_directory_count * PAGE),
        (layout.blocks, (disk_blocks * 4).div_ceil(PAGE) * PAGE),
        (layout.generations, (layout.pages * 4).div_ceil(PAGE) * PAGE),
    ];
    pieces.extend(layout.segments().iter().map(|s| (s.gpa, s.pages * PAGE)));
    pieces.retain(|piece| piece.1 > 0);
    pieces.sort_unstable();
    pieces
        .into_iter()
        .map(|(start, length)| (start, start + length))
        .collect()
}

fn check(ram: &[Region], fill: Fill, disk_blocks: u64) -> Layout {
    let layout = Layout::plan(ram, KERNEL_END, fill, disk_blocks).unwrap();
    let pieces = pieces(&layout, disk_blocks);
    assert!(
        pieces.windows(2).all(|pair| pair[0].1 <= pair[1].0),
        "{pieces:x?}"
    );
    for (start, end) in pieces {
        assert!(start >= KERNEL_END && start % PAGE == 0);
        assert!(
            ram.iter()
                .any(|region| region.start <= start && end <= region.end)
        );
    }
    assert_eq!(
        layout.segments().iter().map(|s| s.pages).sum::<u64>(),
        layout.pages
    );
    layout
}

#[test]
fn part_of_the_ram() {
    let layout = check(&low(64 * MIB), Fill::Pages(1000), 0);
    assert_eq!(layout.pages, 1000);
    assert_eq!(layout.gpa(999), Some(layout.gpa(0).unwrap() + 999 * PAGE));
    assert_eq!(layout.gpa(1000), None);
}

#[test]
fn all_of_the_ram_around_the_hole() {
    let ram = [
        low(3 * GIB)[0],
        low(3 * GIB)[1],
        Region {
            start: 4 * GIB,
            end: 17 * GIB,
        },
    ];
    let layout = check(&ram, Fill::All, 5000);
    assert_eq!(layout.page_directory_count, 13);
    assert!(layout.page_directories < MAPPED_AT_BOOT);
    assert_eq!(layout.segments().len(), 2);
    let second = layout.segments()[1];
    assert_eq!(layout.gpa(second.first_page), Some(4 * GIB));
    assert_eq!(layout.gpa(second.first_page - 1), Some(3 * GIB - PAGE));
    let all: u64 = pieces(&layout, 5000)
        .iter()
        .map(|(start, end)| end - start)
        .sum();
    assert!(
        all + 2 * PAGE > 16 * GIB - KERNEL_END,
        "little is left over"
    );
}

#[test]
fn too_much_is_refused_with_what_would_fit() {
    let NotEnoughRam { most } =
        Layout::plan(&low(8 * MIB), KERNEL_END, Fill::Pages(1 << 40), 0).unwrap_err();
    let fits = Layout::plan(&low(8 * MIB), KERNEL_END, Fill::Pages(most / PAGE), 0);
    assert_eq!(fits.map(|layout| layout.pages), Ok(most / PAGE));
    assert!(Layout::plan(&[], KERNEL_END, Fill::Pages(1), 0).is_err());
    assert!(Layout::plan(&low(8 * MIB), KERNEL_END, Fill::All, 1 << 40).is_err());
}
