use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::*;
use crate::memory::GuestRam;

/// Takes every chain apart that `memory`, read as descriptor table, available ring and buffers, holds.
fn parse_all(content: &[u8], indirect: bool, mut check: impl FnMut(Request<'_>)) {
    let ram = GuestRam::allocate(2 << 20).unwrap();
    let memory = ram.memory();
    memory.write_slice(content, GuestAddress(0)).unwrap();
    // Table at 0, ring right after it; both full of whatever the content is, except that 16 heads are available.
    memory.write_obj(16u16, GuestAddress(0x1002)).unwrap();
    if indirect {
        for index in 0..16u64 {
            memory.write_obj(4u16, GuestAddress(16 * index + 12)).unwrap();
            memory.write_obj([0x100 * index, 0x100], GuestAddress(16 * index)).unwrap();
        }
    }
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_size(16);
    queue.set_avail_ring_address(Some(0x1000), None);
    queue.set_used_ring_address(Some(0x2000), None);
    queue.set_ready(true);
    while let Some(chain) = queue.iter(memory).unwrap().next() {
        if let Ok(request) = Request::parse(memory, chain) {
            check(request);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_content_of_guest_memory_does_harm(content in prop::collection::vec(any::<u8>(), 0x1100), small in any::<bool>(), indirect in any::<bool>()) {
        let mut content = content;
        if small {
            // Addresses and lengths that often lie in RAM, next indices that often lie in the table.
            for descriptor in content[..0x1000].chunks_mut(16) {
                descriptor[3..8].fill(0);
                descriptor[10..12].fill(0);
                descriptor[12] &= 7;
                descriptor[13] = 0;
                descriptor[14] &= 15;
                descriptor[15] = 0;
            }
            for head in content[0x1000..].chunks_mut(2) {
                head[0] &= 15;
                head[1] = 0;
            }
        }
        parse_all(&content, indirect, |request| {
            assert!(request.status.0 < 2 << 20);
            let length = |data: &[GuestSlice<'_>]| {
                assert!(data.len() <= usize::from(QUEUE_SIZE));
                data.iter().map(|slice| slice.len() as u64).sum::<u64>()
            };
            match &request.operation {
                Ok(Operation::In { data, .. } | Operation::GetId { data }) => assert_eq!(length(data), u64::from(request.writable)),
                Ok(Operation::Out { data, .. }) => assert!(length(data) <= u64::from(u32::MAX)),
                Ok(Operation::Discard(ranges)) => assert!((1..=32).contains(&ranges.len())),
                Ok(Operation::WriteZeroes(ranges)) => assert_eq!(ranges.len(), 1),
                Ok(Operation::Flush) | Err(_) => {}
            }
        });
    }
}
