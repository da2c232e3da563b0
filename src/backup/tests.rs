use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::id::{BackupId, Fingerprint};
use super::incremental::{Change, FormatError, Header, MAX_DATA, Reader, Writer};
use super::restore::{Chain, RestoreError, Restored};
use super::sparse::{CLUSTER, NewFile, clusters_with_data, is_zero};

const SIZE: u64 = 10 * CLUSTER + 512;
const ORPHAN: BackupId = BackupId([9; 16]);

fn header(id: u8, parents: &[BackupId]) -> Header {
    Header { id: BackupId([id; 16]), parents: parents.to_vec(), disk: "root".into(), size: SIZE, granularity: 65536 }
}

fn encode(header: &Header, changes: &[(u64, Change<'_>)]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), header).unwrap();
    changes.iter().for_each(|(offset, change)| writer.change(*offset, *change).unwrap());
    writer.finish().unwrap()
}

fn read_all(bytes: &[u8]) -> Result<(), FormatError> {
    let mut reader = Reader::new(bytes)?;
    while reader.next_change()?.is_some() {}
    Ok(())
}

fn id_of(image: &[u8]) -> BackupId {
    let mut fingerprint = Fingerprint::new(image.len() as u64);
    clusters_with_data(image, 0).for_each(|(offset, cluster)| fingerprint.add(cluster, offset));
    fingerprint.id()
}

/// A directory with a full backup.
struct Bench {
    directory: TempDir,
    image: Vec<u8>,
    id: BackupId,
}

impl Bench {
    fn new() -> Self {
        let mut image = vec![0; SIZE as usize];
        image[CLUSTER as usize + 5] = 1;
        image[SIZE as usize - 1] = 2;
        let bench = Bench { directory: tempfile::tempdir().unwrap(), id: id_of(&image), image };
        bench.file("full", &bench.image);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn restore(&self, incrementals: &[PathBuf]) -> Result<Restored, RestoreError> {
        Chain::open(&self.path("full"), incrementals)?.restore(&self.path("image"), false, |_, _| true)
    }

    fn refusal(&self, incrementals: &[PathBuf]) -> String {
        let refusal = self.restore(incrementals).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(self.directory.path()).unwrap().filter(|entry| is_image(&entry.as_ref().unwrap().path())).count(), 0);
        refusal
    }
}

fn is_image(path: &Path) -> bool {
    path.file_name().unwrap().to_str().unwrap().starts_with("image")
}

#[test]
fn ids_are_their_digits() {
    let id = BackupId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
    assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0eff");
    assert_eq!(id.to_string().parse(), Ok(id));
    for wrong in ["", "+00102030405060708090a0b0c0d0eff", "000102030405060708090a0b0c0d0efF", "0001"] {
        assert_eq!(wrong.parse::<BackupId>(), Err(()));
    }
    assert_ne!(BackupId::random().unwrap(), BackupId::random().unwrap());
}

#[test]
fn zeros_are_found_at_any_length() {
    for length in 0..40 {
        let mut bytes = vec![0; length];
        assert!(is_zero(&bytes));
        for place in 0..length {
            bytes[place] = 0x80;
            assert!(!is_zero(&bytes));
            bytes[place] = 0;
        }
    }
}

#[test]
fn what_was_written_is_read() {
    let (data, header) = (vec![7; MAX_DATA], header(1, &[ORPHAN]));
    let changes = [(0, Change::Zeros(512)), (512, Change::Data(&data[..CLUSTER as usize])), (9 * CLUSTER, Change::Zeros(CLUSTER + 512))];
    let bytes = encode(&header, &changes);
    let mut reader = Reader::new(&bytes[..]).unwrap();
    assert_eq!(*reader.header(), header);
    for change in changes {
        assert_eq!(reader.next_change().unwrap(), Some(change));
    }
    assert_eq!(reader.next_change().unwrap(), None);
}

#[test]
fn what_was_not_written_so_is_refused() {
    let bytes = encode(&header(1, &[ORPHAN]), &[(4096, Change::Data(&[7; 4096])), (8192, Change::Zeros(4096))]);
    read_all(&bytes).unwrap();
    for length in 0..bytes.len() {
        assert!(read_all(&bytes[..length]).is_err(), "{length} bytes of it");
    }
    for place in 0..bytes.len() {
        let mut wrong = bytes.clone();
        wrong[place] ^= 0x10;
        assert!(read_all(&wrong).is_err(), "with a wrong byte {place}");
    }
    assert!(matches!(read_all(&[&bytes[..], &[0]].concat()), Err(FormatError::Damaged("there is more behind its end"))));
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert!(matches!(read_all(&newer), Err(FormatError::Version(2))));

    let zeros = |places: &[(u64, u64)]| {
        let changes: Vec<_> = places.iter().map(|(offset, length)| (*offset, Change::Zeros(*length))).collect();
        read_all(&encode(&header(1, &[]), &changes))
    };
    zeros(&[(0, SIZE)]).unwrap();
    for places in [&[(0, 0)][..], &[(0, SIZE + 1)], &[(SIZE, 1)], &[(u64::MAX, 2)], &[(512, 512), (0, 512)], &[(0, 1024), (512, 512)]] {
        assert!(matches!(zeros(places), Err(FormatError::Damaged("a record is out of place"))), "{places:?}");
    }
}

#[test]
fn a_chain_becomes_an_image() {
    let bench = Bench::new();
    let cluster = vec![3; CLUSTER as usize];
    let first =
        bench.file("1", &encode(&header(1, &[bench.id]), &[(CLUSTER, Change::Zeros(CLUSTER)), (3 * CLUSTER, Change::Data(&cluster))]));
    let second = bench.file("2", &encode(&header(2, &[BackupId([1; 16])]), &[(3 * CLUSTER, Change::Data(&[4; 512]))]));
    let restored = bench.restore(&[first, second]).unwrap();
    let mut expected = bench.image.clone();
    expected[CLUSTER as usize..2 * CLUSTER as usize].fill(0);
    expected[3 * CLUSTER as usize..4 * CLUSTER as usize].fill(3);
    expected[3 * CLUSTER as usize..][..512].fill(4);
    assert!(std::fs::read(bench.path("image")).unwrap() == expected);
    assert_eq!(restored.size, SIZE);
    assert!(restored.stored <= 3 * CLUSTER, "{restored:?}");
}

#[test]
fn what_follows_two_backups_is_applied_to_either() {
    let bench = Bench::new();
    let change = [(0, Change::Data(&[5; 512][..]))];
    let first = bench.file("1", &encode(&header(1, &[bench.id]), &change));
    let second = bench.file("2", &encode(&header(2, &[bench.id, BackupId([1; 16])]), &change));
    bench.restore(&[first, second.clone()]).unwrap();
    std::fs::remove_file(bench.path("image")).unwrap();
    bench.restore(&[second]).unwrap();
}

#[test]
fn a_broken_chain_is_refused_in_words() {
    let bench = Bench::new();
    let file = |name: &str, id, parents: &[BackupId]| bench.file(name, &encode(&header(id, parents), &[]));
    let (first, orphan) = (file("1", 1, &[bench.id]), file("3", 3, &[ORPHAN]));
    assert!(bench.refusal(std::slice::from_ref(&orphan)).contains("/3 was not made after"));
    assert!(bench.refusal(&[first.clone(), orphan]).contains("/3 was not made after"));
    let beside = file("2", 2, &[bench.id]);
    let refusal = bench.refusal(&[first.clone(), beside]);
    assert!(refusal.contains("leave") && refusal.contains("/1 out"), "{refusal}");
    let smaller = bench.file("4", &encode(&Header { size: 512, ..header(4, &[bench.id]) }, &[]));
    assert!(bench.refusal(&[smaller]).contains("is of a disk of 512 bytes"));
    assert!(bench.refusal(&[bench.path("full")]).contains("it is no incremental backup"));
    assert!(bench.refusal(&[bench.path("none")]).contains("cannot read"));
    assert!(bench.refusal(&[bench.directory.path().to_owned()]).contains("it is no file"));
    // The full backup is not what it was.
    File::options().write(true).open(bench.path("full")).unwrap().write_all_at(&[1], 0).unwrap();
    assert!(bench.refusal(std::slice::from_ref(&first)).contains("the earlier one was changed since"));
    std::fs::copy(&first, bench.path("full")).unwrap();
    assert!(bench.refusal(&[]).contains("the first file is the full one"));
}

#[test]
fn a_restore_that_is_interrupted_leaves_nothing() {
    let bench = Bench::new();
    let chain = bench.path("full");
    let interrupted = Chain::open(&chain, &[]).unwrap().restore(&bench.path("image"), false, |_, _| false);
    assert!(matches!(interrupted, Err(RestoreError::Interrupted)));
    assert!(!bench.path("image").exists() && !bench.path("image.new").exists());
}

#[test]
fn a_new_file_has_its_name_when_it_is_whole() {
    let bench = Bench::new();
    let path = bench.path("image");
    // What one that was killed has left.
    bench.file("image.new", &[1; 100]);
    let file = NewFile::create(&path, false).unwrap();
    assert!(NewFile::create(&path, false).unwrap_err().to_string().contains("somebody else is writing it"));
    file.set_size(4 * CLUSTER).unwrap();
    file.write_at(&[1; 1024], 512).unwrap();
    file.zero(1024, CLUSTER).unwrap();
    assert!(!path.exists());
    let stored = file.keep().unwrap();
    let metadata = path.metadata().unwrap();
    assert_eq!((metadata.len(), metadata.blocks() * 512, metadata.mode() & 0o777), (4 * CLUSTER, stored, 0o600));
    let mut bytes = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
    assert!(bytes.iter().enumerate().all(|(place, byte)| *byte == u8::from((512..1024).contains(&place))));
    assert!(!bench.path("image.new").exists());
    assert!(NewFile::create(&path, false).unwrap_err().to_string().contains("--force"));
    drop(NewFile::create(&path, true).unwrap());
    assert!(path.exists() && !bench.path("image.new").exists());
}
