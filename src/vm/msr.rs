//! Which model-specific registers move with the guest, and how they are read and written.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::VmError;

/// The time-stamp counter.
pub const TSC: u32 = 0x10;
/// When the local APIC's timer fires, in terms of the TSC.
pub const TSC_DEADLINE: u32 = 0x6e0;
const TSC_ADJUST: u32 = 0x3b;

/// MTRRs: default type, fixed ranges, variable ranges. Older kernels leave them out of their list.
const MTRRS: [u32; 12] = [0x2ff, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const MTRR_VARIABLE: std::ops::Range<u32> = 0x200..0x210;
/// Machine-check banks: control, status, address, miscellaneous for each of [`MC_BANKS`].
const MC_FIRST: u32 = 0x400;
const MC_BANKS: u32 = 32;

/// An MSR's index and value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Index as RDMSR takes it.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// The MSRs that move with the guest: all that KVM lists, the MTRRs and the machine-check banks, as far as `vcpu`, with its CPUID set,
/// has them. In the order in which they are to be written: TSC_DEADLINE starts a timer against the TSC, so it comes after it, last.
pub fn indices(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, VmError> {
    let list = kvm.get_msr_index_list().map_err(VmError::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices: Vec<u32> = list.as_slice().to_vec();
    indices.extend(MTRRS.into_iter().chain(MTRR_VARIABLE).chain(MC_FIRST..MC_FIRST + 4 * MC_BANKS));
    indices.sort_unstable_by_key(|index| (*index == TSC_DEADLINE, *index != TSC, *index != TSC_ADJUST, *index));
    indices.dedup();
    let mut present = Vec::with_capacity(indices.len());
    let mut rest = indices.as_slice();
    while !rest.is_empty() {
        let chunk = rest.get(..KVM_MAX_MSR_ENTRIES).unwrap_or(rest);
        let read = get_chunk(vcpu, chunk)?;
        present.extend(chunk.iter().take(read.len()));
        // KVM stopped at the first one that this vCPU does not have.
        rest = rest.get(read.len() + usize::from(read.len() < chunk.len())..).unwrap_or_default();
    }
    Ok(present)
}

/// Reads `indices`; one that cannot be read is an error.
pub fn get(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VmError> {
    let mut msrs = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(KVM_MAX_MSR_ENTRIES) {
        let read = get_chunk(vcpu, chunk)?;
        if let Some(index) = chunk.get(read.len()) {
            return Err(VmError::MsrRead(*index));
        }
        msrs.extend(read);
    }
    Ok(msrs)
}

/// Writes `msrs` in their order; one that cannot be written is an error.
pub fn set(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), VmError> {
    for chunk in msrs.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk.iter().map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() }).collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| VmError::OutOfMemory)?;
        let count = vcpu.set_msrs(&entries).map_err(VmError::kvm("KVM_SET_MSRS"))?;
        if let Some(refused) = chunk.get(count) {
            return Err(VmError::MsrWrite(*refused));
        }
    }
    Ok(())
}

fn get_chunk(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VmError> {
    let entries: Vec<_> = indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut entries = Msrs::from_entries(&entries).map_err(|_| VmError::OutOfMemory)?;
    let count = vcpu.get_msrs(&mut entries).map_err(VmError::kvm("KVM_GET_MSRS"))?;
    Ok(entries.as_slice().iter().take(count).map(|entry| Msr { index: entry.index, value: entry.data }).collect())
}
