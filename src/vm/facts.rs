//! What a guest needs of its host, told before the guest is disturbed: the source sends [`MachineFacts`], the destination holds them
//! against its own [`HostFacts`] and answers with everything that it lacks.

use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::{Vm, VmError, cpuid, msr, save_vcpu};

/// KVM runs a guest without TSC scaling if the rates differ by no more than this (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// A CPUID leaf's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// EAX, EBX, ECX and EDX on return.
    pub registers: [u32; 4],
}

/// What a running guest relies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// The processor as it was given to the guest, before the vCPUs were numbered.
    pub cpuid: Vec<CpuidLeaf>,
    /// Number of vCPUs.
    pub cpus: u16,
    /// Rate of the guest's TSC in kHz.
    pub tsc_khz: u32,
    /// The MSRs whose values move.
    pub msrs: Vec<u32>,
    /// Bytes of extended processor state.
    pub xsave_size: u32,
}

/// What this host offers to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The processor that a guest would get here.
    pub cpuid: Vec<CpuidLeaf>,
    /// Most vCPUs of one guest.
    pub max_cpus: u16,
    /// Rate of the TSC in kHz.
    pub tsc_khz: u32,
    /// Whether a guest's TSC can run at another rate.
    pub tsc_scaling: bool,
    /// The MSRs that a vCPU has here.
    pub msrs: Vec<u32>,
    /// Bytes of extended processor state.
    pub xsave_size: u32,
}

impl MachineFacts {
    /// The facts of `vm`, in any state.
    pub fn of<S>(vm: &Vm<S>) -> Self {
        let known = vm.known();
        MachineFacts {
            cpuid: leaves(vm.cpuid()),
            cpus: vm.config().cpus,
            tsc_khz: known.map_or(0, |known| known.tsc_khz),
            msrs: known.map_or_else(Vec::new, |known| known.msrs.to_vec()),
            xsave_size: known.map_or(0, |known| u32::try_from(known.xsave_size).unwrap_or(u32::MAX)),
        }
    }

    /// Everything that `host` lacks, one sentence each; none if the guest can run there.
    pub fn refusals(&self, host: &HostFacts) -> Vec<String> {
        let mut refusals = Vec::new();
        let (guest_vendor, host_vendor) = (vendor(&self.cpuid), vendor(&host.cpuid));
        if guest_vendor != host_vendor {
            refusals.push(format!("the guest runs on a processor of {guest_vendor}, this host has one of {host_vendor}"));
        }
        if self.cpus > host.max_cpus {
            refusals.push(format!("the guest has {} vCPUs, this host's KVM takes {}", self.cpus, host.max_cpus));
        }
        let missing = missing_features(&self.cpuid, &host.cpuid);
        if !missing.is_empty() {
            refusals.push(format!("this host's processor or KVM lacks features that the guest may use: {}", missing.join(", ")));
        }
        let tolerance = u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM / 1_000_000;
        if !host.tsc_scaling && u64::from(self.tsc_khz.abs_diff(host.tsc_khz)) > tolerance {
            let (guest, host) = (self.tsc_khz, host.tsc_khz);
            refusals.push(format!("the guest's TSC runs at {guest} kHz, this host's at {host} kHz, and this host cannot scale it"));
        }
        let known: BTreeSet<u32> = host.msrs.iter().copied().collect();
        let unknown: Vec<String> = self.msrs.iter().filter(|index| !known.contains(index)).map(|index| format!("{index:#x}")).collect();
        if !unknown.is_empty() {
            refusals.push(format!("this host's KVM does not have these MSRs of the guest: {}", unknown.join(", ")));
        }
        if self.xsave_size > host.xsave_size {
            let (guest, host) = (self.xsave_size, host.xsave_size);
            refusals.push(format!("the guest has {guest} bytes of extended processor state, this host keeps {host}"));
        }
        refusals
    }
}

impl HostFacts {
    /// Asks this host's KVM, on a machine of one vCPU made for the purpose.
    pub fn read() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(VmError::Open)?;
        let base = cpuid::base(&kvm)?;
        let vm = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        vm.create_irq_chip().map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
        let vcpu = vm.create_vcpu(0).map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(&base, 0, 1)?).map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        Ok(HostFacts {
            cpuid: leaves(&base),
            max_cpus: u16::try_from(kvm.get_max_vcpus()).unwrap_or(u16::MAX),
            tsc_khz: vcpu.get_tsc_khz().map_err(VmError::kvm("KVM_GET_TSC_KHZ"))?,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            msrs: msr::indices(&kvm, &vcpu)?,
            xsave_size: u32::try_from(save_vcpu::xsave_size(&vm)?).unwrap_or(u32::MAX),
        })
    }
}

fn leaves(entries: &[kvm_cpuid_entry2]) -> Vec<CpuidLeaf> {
    let leaf = |entry: &kvm_cpuid_entry2| CpuidLeaf {
        function: entry.function,
        index: entry.index,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    };
    entries.iter().map(leaf).collect()
}

fn registers(leaves: &[CpuidLeaf], function: u32, index: u32) -> [u32; 4] {
    leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).map_or([0; 4], |leaf| leaf.registers)
}

fn vendor(leaves: &[CpuidLeaf]) -> String {
    let [_, ebx, ecx, edx] = registers(leaves, 0, 0);
    let bytes: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Registers of CPUID whose bits are features: leaf, subleaf, which register (0 is EAX), and the bits that follow the guest's own settings
/// and so say nothing about the processor (OSXSAVE, OSPKE).
const FEATURE_REGISTERS: [(u32, u32, usize, u32); 19] = [
    (1, 0, 2, 1 << 27),
    (1, 0, 3, 0),
    (7, 0, 1, 0),
    (7, 0, 2, 1 << 4),
    (7, 0, 3, 0),
    (7, 1, 0, 0),
    (7, 1, 3, 0),
    (7, 2, 3, 0),
    (0xd, 0, 0, 0),
    (0xd, 0, 3, 0),
    (0xd, 1, 0, 0),
    (0xd, 1, 2, 0),
    (0x4000_0001, 0, 0, 0),
    (0x8000_0001, 0, 2, 0),
    (0x8000_0001, 0, 3, 0),
    (0x8000_0007, 0, 3, 0),
    (0x8000_0008, 0, 1, 0),
    (0x8000_0021, 0, 0, 0),
    (0xc000_0001, 0, 3, 0),
];

fn missing_features(guest: &[CpuidLeaf], host: &[CpuidLeaf]) -> Vec<String> {
    let mut missing = Vec::new();
    for (function, index, register, ignored) in FEATURE_REGISTERS {
        let bits = |leaves| registers(leaves, function, index).get(register).copied().unwrap_or(0);
        let lacking = bits(guest) & !bits(host) & !ignored;
        missing.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| name(function, index, register, bit)));
    }
    missing
}

/// The features that people know by name: leaf, subleaf, register, bit, name as in /proc/cpuinfo.
const NAMES: [(u32, u32, usize, u32, &str); 47] = [
    (1, 0, 2, 0, "sse3"),
    (1, 0, 2, 1, "pclmulqdq"),
    (1, 0, 2, 9, "ssse3"),
    (1, 0, 2, 12, "fma"),
    (1, 0, 2, 13, "cx16"),
    (1, 0, 2, 17, "pcid"),
    (1, 0, 2, 19, "sse4_1"),
    (1, 0, 2, 20, "sse4_2"),
    (1, 0, 2, 21, "x2apic"),
    (1, 0, 2, 22, "movbe"),
    (1, 0, 2, 23, "popcnt"),
    (1, 0, 2, 24, "tsc_deadline_timer"),
    (1, 0, 2, 25, "aes"),
    (1, 0, 2, 26, "xsave"),
    (1, 0, 2, 28, "avx"),
    (1, 0, 2, 29, "f16c"),
    (1, 0, 2, 30, "rdrand"),
    (7, 0, 1, 0, "fsgsbase"),
    (7, 0, 1, 3, "bmi1"),
    (7, 0, 1, 5, "avx2"),
    (7, 0, 1, 7, "smep"),
    (7, 0, 1, 8, "bmi2"),
    (7, 0, 1, 9, "erms"),
    (7, 0, 1, 10, "invpcid"),
    (7, 0, 1, 16, "avx512f"),
    (7, 0, 1, 17, "avx512dq"),
    (7, 0, 1, 18, "rdseed"),
    (7, 0, 1, 19, "adx"),
    (7, 0, 1, 20, "smap"),
    (7, 0, 1, 23, "clflushopt"),
    (7, 0, 1, 29, "sha_ni"),
    (7, 0, 1, 30, "avx512bw"),
    (7, 0, 1, 31, "avx512vl"),
    (7, 0, 2, 2, "umip"),
    (7, 0, 2, 3, "pku"),
    (7, 0, 2, 9, "vaes"),
    (7, 0, 2, 16, "la57"),
    (7, 0, 3, 26, "spec_ctrl"),
    (7, 0, 3, 31, "ssbd"),
    (0xd, 1, 0, 1, "xsavec"),
    (0xd, 1, 0, 3, "xsaves"),
    (0x8000_0001, 0, 2, 5, "abm"),
    (0x8000_0001, 0, 2, 6, "sse4a"),
    (0x8000_0001, 0, 3, 20, "nx"),
    (0x8000_0001, 0, 3, 26, "pdpe1gb"),
    (0x8000_0001, 0, 3, 27, "rdtscp"),
    (0x8000_0008, 0, 1, 12, "ibpb"),
];

fn name(function: u32, index: u32, register: usize, bit: u32) -> String {
    let known = NAMES.iter().find(|known| (known.0, known.1, known.2, known.3) == (function, index, register, bit));
    let letter = ["EAX", "EBX", "ECX", "EDX"].get(register).copied().unwrap_or_default();
    known.map_or_else(|| format!("CPUID {function:#x}.{index} {letter} bit {bit}"), |known| known.4.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (MachineFacts, HostFacts) {
        let leaf = |function, registers| CpuidLeaf { function, index: 0, registers };
        let vendor = leaf(0, [13, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        let cpuid = vec![vendor, leaf(1, [0, 0, 1 << 20 | 1 << 27 | 1 << 28, 1])];
        let host = HostFacts {
            cpuid: vec![vendor, leaf(1, [0, 0, 1 << 20 | 1 << 28, 1 | 1 << 9])],
            max_cpus: 8,
            tsc_khz: 2_000_400,
            tsc_scaling: false,
            msrs: vec![0x10, 0x174],
            xsave_size: 4096,
        };
        (MachineFacts { cpuid, cpus: 2, tsc_khz: 2_000_000, msrs: vec![0x10], xsave_size: 4096 }, host)
    }

    #[test]
    fn a_host_that_offers_more_is_accepted() {
        let (facts, host) = pair();
        assert_eq!(facts.refusals(&host), [""; 0]);
    }

    #[test]
    fn everything_that_is_lacking_is_told() {
        let (mut facts, mut host) = pair();
        facts.cpus = 9;
        facts.msrs.push(0x6e0);
        facts.xsave_size += 1;
        host.tsc_khz = 2_001_000;
        host.cpuid[1].registers[2] = 1 << 20;
        host.cpuid[0].registers[1] += 1;
        let refusals = facts.refusals(&host);
        let told = |what: &str| assert!(refusals.iter().any(|refusal| refusal.contains(what)), "{what}: {refusals:?}");
        ["GenuineIntel", "9 vCPUs", ": avx", "2001000 kHz", "0x6e0", "4097 bytes"].into_iter().for_each(told);
        assert_eq!(refusals.len(), 6);
        host.tsc_scaling = true;
        assert_eq!(facts.refusals(&host).len(), 5);
    }

    #[test]
    fn this_host_accepts_what_it_runs() {
        let host = HostFacts::read().unwrap();
        let facts = MachineFacts {
            cpuid: host.cpuid.clone(),
            cpus: 1,
            tsc_khz: host.tsc_khz,
            msrs: host.msrs.clone(),
            xsave_size: host.xsave_size,
        };
        assert_eq!(facts.refusals(&host), [""; 0]);
    }
}
