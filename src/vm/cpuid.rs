//! The processor that the guest sees: what KVM supports, the machine's topology, and nothing whose state is not saved.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::VmError;

mod leaf1 {
    pub const ECX_MONITOR: u32 = 1 << 3;
    pub const ECX_VMX: u32 = 1 << 5;
    pub const ECX_X2APIC: u32 = 1 << 21;
    pub const ECX_OSXSAVE: u32 = 1 << 27;
    pub const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub const ECX_HYPERVISOR: u32 = 1 << 31;
    pub const EDX_HTT: u32 = 1 << 28;
}
/// Alike in leaves 1 and 8000_0001h.
const EDX_APIC: u32 = 1 << 9;
const LEAF_7_ECX_OSPKE: u32 = 1 << 4;
const LEAF_7_EBX_SGX: u32 = 1 << 2;
const LEAF_80000001_ECX_SVM: u32 = 1 << 2;
const LEAF_80000001_ECX_PERFCTR_CORE: u32 = 1 << 23;

/// The CPUID entries of this host's KVM, as every vCPU gets them before [`for_vcpu`] numbers it.
pub fn base(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, VmError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let mut entries = supported.as_slice().to_vec();
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx |= leaf1::ECX_HYPERVISOR | leaf1::ECX_X2APIC;
                if tsc_deadline {
                    entry.ecx |= leaf1::ECX_TSC_DEADLINE;
                }
                entry.ecx &= !(leaf1::ECX_MONITOR | leaf1::ECX_VMX);
            }
            (7, 0) => entry.ebx &= !LEAF_7_EBX_SGX,
            (0x8000_0001, _) => entry.ecx &= !(LEAF_80000001_ECX_SVM | LEAF_80000001_ECX_PERFCTR_CORE),
            // Performance counters, SGX, nested virtualization: their state stays on the host.
            (0xa | 0x12 | 0x8000_000a | 0x8000_0022, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    Ok(entries)
}

/// `base` for vCPU `id` of `cpus`: one package, one thread per core, APIC ID equal to the vCPU number.
pub fn for_vcpu(base: &[kvm_cpuid_entry2], id: u16, cpus: u16) -> Result<CpuId, VmError> {
    let count = u32::from(cpus);
    let id = u32::from(id);
    // Bits of the APIC ID that number the cores of a package.
    let bits = count.next_power_of_two().trailing_zeros();
    let is_topology = |entry: &kvm_cpuid_entry2| matches!(entry.function, 0xb | 0x1f);
    let mut entries: Vec<_> = base.iter().filter(|entry| !is_topology(entry)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                let logical = (1u32 << bits).min(255);
                entry.ebx = entry.ebx & 0xffff | logical << 16 | (id & 0xff) << 24;
                entry.edx = if count > 1 { entry.edx | leaf1::EDX_HTT } else { entry.edx & !leaf1::EDX_HTT };
            }
            // Caches (Intel, AMD): the third level is the package's, the others are each core's own.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { (1u32 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | (sharing & 0xfff) << 14;
                if entry.function == 4 {
                    entry.eax |= (((1u32 << bits) - 1) & 0x3f) << 26;
                }
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (count - 1).min(0xff) | bits << 12,
            // AMD: APIC ID; core number, one thread per core; one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
    let last_leaf = base.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for function in [0xb, 0x1f].into_iter().filter(|function| *function <= last_leaf) {
        // Levels: one thread per core, then the cores of the package, then the end of the list.
        let levels = [(0, 1, 1 << 8), (bits, count, 2 << 8 | 1), (0, 0, 2)];
        for (index, (eax, ebx, ecx)) in (0..).zip(levels) {
            let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            entries.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx: id, ..Default::default() });
        }
    }
    CpuId::from_entries(&entries).map_err(|_| VmError::TooManyCpuidEntries(entries.len()))
}

/// Whether two vCPUs have the same features. What KVM makes of a vCPU's registers (CR4, XCR0, the APIC's base) does not count: it does so
/// again when they are loaded.
pub fn are_alike(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> bool {
    let fixed = |entry: &kvm_cpuid_entry2| {
        let mut entry = *entry;
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx &= !leaf1::ECX_OSXSAVE;
                entry.edx &= !EDX_APIC;
            }
            (7, 0) => entry.ecx &= !LEAF_7_ECX_OSPKE,
            // Bytes of the enabled extended state.
            (0xd, 0 | 1) => entry.ebx = 0,
            (0x8000_0001, _) => entry.edx &= !EDX_APIC,
            _ => {}
        }
        entry
    };
    one.iter().map(fixed).eq(other.iter().map(fixed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_registers_makes_no_difference() {
        let leaf = |function, ebx, ecx| kvm_cpuid_entry2 { function, ebx, ecx, ..Default::default() };
        let sets = [[leaf(1, 3, 1), leaf(0xd, 576, 832)], [leaf(1, 3, 1 | 1 << 27), leaf(0xd, 832, 832)]];
        assert!(are_alike(&sets[0], &sets[1]));
        assert!(!are_alike(&sets[0], &[leaf(1, 3, 3), leaf(0xd, 576, 832)]));
        assert!(!are_alike(&sets[0], &sets[0][..1]));
    }

    #[test]
    fn topology_of_three_processors() {
        let leaf = |function, index, eax, ebx| kvm_cpuid_entry2 { function, index, eax, ebx, ..Default::default() };
        let base =
            [leaf(0, 0, 0x1f, 0), leaf(1, 0, 0, 0x1234_5678), leaf(4, 0, 1 | 1 << 5, 0), leaf(4, 3, 3 | 3 << 5, 0), leaf(0xb, 0, 9, 9)];
        let cpuid = for_vcpu(&base, 2, 3).unwrap();
        let find = |function, index| *cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap();
        assert_eq!(find(1, 0).ebx, 0x0204_5678);
        assert_eq!(find(4, 0).eax >> 14, 3 << 12);
        assert_eq!(find(4, 3).eax >> 14, 3 << 12 | 3);
        let core = find(0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert_eq!(cpuid.as_slice().iter().filter(|entry| entry.function == 0xb).count(), 3);
        assert_eq!(find(0x1f, 0).edx, 2);
    }
}
