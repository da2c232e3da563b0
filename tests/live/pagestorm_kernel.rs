//! The test kernel, built once into a target directory of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Path of the kernel.
pub fn path() -> &'static Path {
    static KERNEL: OnceLock<PathBuf> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/pagestorm");
        let target = directory.join("target");
        let mut cargo = Command::new(env!("CARGO"));
        // What the running cargo tells its children is about another package.
        cargo.current_dir(&directory).args(["build", "--release", "--quiet", "--target-dir"]).arg(&target);
        let output = cargo.output().unwrap();
        assert!(output.status.success(), "pagestorm does not build:\n{}", String::from_utf8_lossy(&output.stderr));
        target.join("release/pagestorm")
    })
}
