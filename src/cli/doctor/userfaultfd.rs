//! userfaultfd, which postcopy rests on (Linux, Documentation/admin-guide/mm/userfaultfd.rst).

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{FromRawFd, OwnedFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::Check;

/// `UFFD_API`, the only version there is.
const API: u64 = 0xaa;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);

ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, UffdioApi);

/// `_UFFDIO_REGISTER` and `_UFFDIO_UNREGISTER` as bits of [`UffdioApi::ioctls`].
const REGISTER: u64 = 1 << 0 | 1 << 1;

/// Features that make postcopy better, by their bits in [`UffdioApi::features`], and what comes of their absence.
const FEATURES: [(&str, u32, &str); 3] = [
    ("userfaultfd: thread of a fault", 8, "Linux 4.14 has it; without it a report cannot tell vCPUs apart"),
    ("userfaultfd: POISON", 14, "Linux 6.6 has it; without it a page that is lost for good makes the guest wait"),
    ("userfaultfd: MOVE", 16, "Linux 6.8 has it; without it pages are copied into place"),
];

pub(super) fn checks() -> Vec<Check> {
    const NAME: &str = "userfaultfd with kernel faults";
    let (descriptor, way) = match open() {
        Ok(opened) => opened,
        Err(error) => return vec![Check::no(NAME, error.to_string(), advice(&error)).needed()],
    };
    let mut api = UffdioApi { api: API, ..Default::default() };
    // SAFETY: the ioctl reads and writes one `struct uffdio_api`, which `UffdioApi` is.
    let status = unsafe { ioctl_with_mut_ref(&descriptor, UFFDIO_API(), &mut api) };
    if status != 0 || api.ioctls & REGISTER != REGISTER {
        let error = Error::last_os_error();
        return vec![Check::no(NAME, format!("handshake failed: {error}"), "use Linux 4.14 or newer").needed()];
    }
    let mut checks = vec![Check::yes(NAME, way).needed()];
    checks.extend(FEATURES.map(|(name, bit, advice)| match api.features & 1 << bit {
        0 => Check::no(name, "absent", advice),
        _ => Check::yes(name, "present"),
    }));
    checks
}

/// Opens a userfaultfd that gets the faults of KVM too: by the device, or where there is none by the system call, which needs a
/// privilege or a setting. Migration opens it in the same way.
fn open() -> Result<(OwnedFd, &'static str)> {
    match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => {
            // SAFETY: the ioctl takes flags by value and gives a new descriptor.
            let opened = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), libc::O_CLOEXEC as libc::c_ulong) };
            descriptor(opened.into()).map(|descriptor| (descriptor, "/dev/userfaultfd"))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // SAFETY: the call takes flags by value and gives a new descriptor.
            descriptor(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) }).map(|descriptor| (descriptor, "system call"))
        }
        Err(error) => Err(error),
    }
}

fn descriptor(result: i64) -> Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just given us this descriptor; nobody else has it.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(Error::last_os_error()),
    }
}

fn advice(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied => {
            "as root, `chgrp kvm /dev/userfaultfd && chmod g+rw /dev/userfaultfd`, or where there is no such device \
             `sysctl vm.unprivileged_userfaultfd=1`; without it only precopy works"
        }
        _ => "the kernel is built without CONFIG_USERFAULTFD, or a seccomp profile forbids it; without it only precopy works",
    }
}
