use std::os::unix::fs::MetadataExt;

use tempfile::TempDir;

use super::*;

fn scratch() -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let incoming = directory.path().join("disk.img.incoming");
    (directory, path, incoming)
}

fn create(path: &Path) -> Result<(IncomingFile, LockedImage), IncomingError> {
    IncomingFile::create(path, 1 << 20, CacheMode::Writeback)
}

fn refusal(path: &Path) -> String {
    create(path).map(drop).unwrap_err().to_string()
}

#[test]
fn a_file_that_is_kept_gets_its_name() {
    let (_directory, path, incoming) = scratch();
    let (mut file, image) = create(&path).unwrap();
    let metadata = fs::metadata(&incoming).unwrap();
    assert_eq!((metadata.len(), metadata.blocks(), metadata.mode() & 0o777), (1 << 20, 0, 0o600));
    assert!(!path.exists());
    image.write_at(&[7; 512], 512).unwrap();
    file.keep().unwrap();
    file.keep().unwrap();
    // Still locked.
    assert!(matches!(Image::open(&path, true, CacheMode::Writeback).unwrap().lock().unwrap_err().error, ImageError::InUse { .. }));
    drop((file, image));
    assert!(fs::read(&path).unwrap()[512..1024] == [7; 512] && !incoming.exists());
}

#[test]
fn a_file_that_is_not_kept_goes() {
    let (_directory, path, incoming) = scratch();
    drop(create(&path).unwrap());
    assert!(!incoming.exists() && !path.exists());
    // Nor does one stay that was of no use.
    let error = IncomingFile::create(&path, 1000, CacheMode::Writeback).map(drop).unwrap_err().to_string();
    assert!(error.contains("1000 bytes") && !incoming.exists(), "{error}");
    assert!(IncomingFile::create(&path, u64::MAX, CacheMode::Writeback).is_err() && !incoming.exists());
}

#[test]
fn what_is_there_is_never_overwritten() {
    let (_directory, path, incoming) = scratch();
    fs::write(&path, "precious").unwrap();
    assert!(refusal(&path).ends_with(
        "disk.img is there already, and a migration that copies storage makes the image: remove or rename it, or name another path"
    ));
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert!(refusal(&path).contains("is there already"));
    fs::remove_file(&path).unwrap();
    let (mut file, _image) = create(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let error = file.keep().unwrap_err().to_string();
    assert!(error.contains("because that is there now: remove or rename it"), "{error}");
    assert_eq!(link_instead(&incoming, &path).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    // Then it can be.
    fs::remove_file(&path).unwrap();
    file.keep().unwrap();
}

#[test]
fn what_a_guest_may_have_written_stays() {
    let (_directory, path, incoming) = scratch();
    let (mut file, image) = create(&path).unwrap();
    file.commit();
    drop((file, image));
    let error = refusal(&path);
    assert!(error.contains("disk.img.incoming is there already") && error.contains("remove it, or name another path"), "{error}");
    assert!(incoming.exists());
    fs::remove_file(&incoming).unwrap();
    std::os::unix::fs::symlink(&path, &incoming).unwrap();
    assert!(refusal(&path).contains("is there already") && !path.exists());
}

#[test]
fn without_a_directory_there_is_no_image() {
    let (directory, _, _) = scratch();
    let error = refusal(&directory.path().join("none/disk.img"));
    assert!(
        error.ends_with("none/disk.img cannot be made, because its directory does not exist: make the directory, or name another path"),
        "{error}"
    );
}

#[test]
fn where_the_kernel_does_not_know_how_a_link_does_it() {
    let (_directory, path, incoming) = scratch();
    let (file, _image) = create(&path).unwrap();
    link_instead(&incoming, &path).unwrap();
    assert!(path.exists() && !incoming.exists());
    drop(file);
    assert!(path.exists());
}

#[test]
fn direct_io_wants_whole_blocks() {
    let (_directory, path, incoming) = scratch();
    match IncomingFile::create(&path, 5 * 512, CacheMode::None).map(drop) {
        // A file system whose blocks are sectors.
        Ok(()) => {}
        Err(error) => assert!(
            error.to_string().contains("not a whole number of blocks") || error.to_string().contains("without direct I/O"),
            "{error}"
        ),
    }
    assert!(!incoming.exists());
}
