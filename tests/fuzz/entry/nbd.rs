//! The NBD server: a client's bytes, from its first flags to its last request.

use std::io::{self, Read, Write};
use std::sync::{Arc, LazyLock};

use ferry::block::dirty_bitmap::{DirtyBitmaps, Granularity};
use ferry::block::nbd::catalogue::{Catalogue, Disconnect};
use ferry::block::nbd::export::Export;
use ferry::block::nbd::negotiation::{Offer, negotiate};
use ferry::block::nbd::transmission::serve;

use super::allocation::within;
use super::virtio_blk::disk;

/// Piece of a read or write and its head, doubled by the vector's growth.
const LIMIT: usize = 3 << 20;
/// Of the disk behind the exports.
const SIZE: u64 = 65536;

/// Says what the input says, and hears nothing.
struct Client<'a>(&'a [u8]);

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An export `r` that cannot be written, with a bitmap `b`, and `w` that can.
fn catalogue() -> Arc<Catalogue> {
    static CATALOGUE: LazyLock<Arc<Catalogue>> = LazyLock::new(|| {
        let catalogue = Catalogue::new(|_| {});
        let bitmaps = DirtyBitmaps::new(SIZE);
        bitmaps.add("b", Granularity::new(512).expect("a power of two"), true).expect("memory");
        bitmaps.mark(512, 512);
        bitmaps.mark(8192, SIZE);
        for (name, writable) in [("r", None), ("w", Some(disk()))] {
            let bitmaps = vec![("b".into(), Arc::new(bitmaps.copy("b").expect("it was added")))];
            let (id, node, name) = (name.into(), "root".into(), name.into());
            catalogue.add(Export { id, node, name, description: None, source: disk(), writable, bitmaps }).expect("unique");
        }
        catalogue
    });
    CATALOGUE.clone()
}

pub fn run(data: &[u8]) {
    let mut client = Client(data);
    let disconnect: Disconnect = Arc::new(|| {});
    let offer = Offer { catalogue: &catalogue(), multi_conn: true };
    let Ok(Some(session)) = within(LIMIT, || negotiate(&mut client, &offer, &disconnect)) else { return };
    let source = session.export.source.clone();
    for context in &session.contexts {
        let extents = context.extents(&*source, 0, SIZE as u32, usize::MAX).expect("of a disk in memory");
        assert_eq!(extents.iter().map(|(length, _)| u64::from(*length)).sum::<u64>(), SIZE);
    }
    let _ = within(LIMIT, || serve(&mut client, &session));
}
