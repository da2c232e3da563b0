//! KVM calls that kvm-ioctls does not have on x86.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::{Error, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

const KVMIO: u32 = 0xae;
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const _: () = assert!(size_of::<kvm_device_attr>() == 24);

fn tsc_offset_attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: value as u64, flags: 0 }
}

/// How much the guest's TSC is ahead of the host's, modulo 2^64 (KVM_VCPU_TSC_OFFSET).
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: `addr` points at eight bytes that outlive the call, which is what this attribute writes.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(offset),
        _ => Err(Error::last()),
    }
}

/// Sets what [`tsc_offset`] reads.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_attribute(&raw const offset);
    // SAFETY: `addr` points at eight bytes that outlive the call, which is what this attribute reads.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(Error::last()),
    }
}
