//! KVM and its extensions (Linux, Documentation/virt/kvm/api.rst).

use std::os::unix::fs::FileTypeExt;

use kvm_bindings as bindings;
use kvm_ioctls::Kvm;

use super::Check;

const API_VERSION: i32 = 12;
const NEWER_KERNEL: &str = "use a newer kernel";

/// An extension: its name, its number, since which kernel it is there, and whether Ferry needs it.
const EXTENSIONS: [(&str, u32, &str, bool); 9] = [
    ("in-kernel irqchip", bindings::KVM_CAP_IRQCHIP, "this KVM lacks it; use KVM on x86-64", true),
    ("irqfd", bindings::KVM_CAP_IRQFD, NEWER_KERNEL, true),
    ("ioeventfd", bindings::KVM_CAP_IOEVENTFD, NEWER_KERNEL, true),
    ("immediate exit", bindings::KVM_CAP_IMMEDIATE_EXIT, "use Linux 4.13 or newer", true),
    ("dirty log with manual protect", bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "use Linux 5.1 or newer", true),
    ("dirty ring", bindings::KVM_CAP_DIRTY_LOG_RING, "--dirty-tracking ring needs Linux 5.11; the dirty log does as well", false),
    ("XSAVE2", bindings::KVM_CAP_XSAVE2, "use Linux 5.17 or newer", true),
    ("TSC frequency can be read", bindings::KVM_CAP_GET_TSC_KHZ, "use a host whose KVM knows its TSC's frequency", true),
    ("TSC scaling", bindings::KVM_CAP_TSC_CONTROL, "move guests between hosts of the same TSC frequency only", false),
];

pub(super) fn checks() -> Vec<Check> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return vec![missing(error.errno())],
    };
    let mut checks = vec![Check::yes("KVM", "/dev/kvm").needed(), api_version(&kvm), virtual_machine(&kvm)];
    checks.extend(EXTENSIONS.map(|(name, extension, advice, needed)| {
        let value = kvm.check_extension_raw(extension.into());
        let check = match value {
            1 => Check::yes(name, "present"),
            2.. => Check::yes(name, format!("present ({value})")),
            _ => Check::no(name, "absent", advice),
        };
        Check { needed, ..check }
    }));
    checks.push(clock_realtime(&kvm));
    checks
}

fn missing(errno: i32) -> Check {
    let error = std::io::Error::from_raw_os_error(errno);
    let is_there = std::fs::metadata("/dev/kvm").is_ok_and(|metadata| metadata.file_type().is_char_device());
    let advice = match errno {
        libc::EACCES | libc::EPERM => "add yourself to the group kvm (`sudo usermod -aG kvm $USER`) and log in again",
        _ if is_there => "load the module (`modprobe kvm_intel` or `modprobe kvm_amd`) and switch on virtualisation in the firmware",
        _ => {
            "load the module (`modprobe kvm_intel` or `modprobe kvm_amd`); in a container, pass /dev/kvm in; in a guest, switch on nesting"
        }
    };
    Check::no("KVM", format!("cannot open /dev/kvm: {error}"), advice).needed()
}

fn api_version(kvm: &Kvm) -> Check {
    match kvm.get_api_version() {
        API_VERSION => Check::yes("KVM API version", API_VERSION.to_string()),
        other => Check::no("KVM API version", other.to_string(), format!("Ferry speaks version {API_VERSION}; use a newer kernel")),
    }
    .needed()
}

fn virtual_machine(kvm: &Kvm) -> Check {
    const NAME: &str = "KVM can make a virtual machine";
    match kvm.create_vm() {
        Ok(_) => Check::yes(NAME, format!("up to {} vCPUs", kvm.get_max_vcpus())),
        Err(error) => Check::no(NAME, error.to_string(), "see the kernel log; another hypervisor may hold the CPU's virtualisation"),
    }
    .needed()
}

fn clock_realtime(kvm: &Kvm) -> Check {
    const NAME: &str = "guest clock against real time";
    let flags = kvm.check_extension_raw(bindings::KVM_CAP_ADJUST_CLOCK.into());
    if u32::try_from(flags).is_ok_and(|flags| flags & bindings::KVM_CLOCK_REALTIME != 0) {
        Check::yes(NAME, "KVM_CLOCK_REALTIME")
    } else {
        Check::no(NAME, "absent", "Linux 5.16 has it; without it a guest's clock loses the downtime of each migration")
    }
}
