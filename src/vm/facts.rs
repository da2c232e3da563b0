            cpuid: host.cpuid.clone(),
            cpuid: leaves(&base),
            cpuid: leaves(vm.cpuid()),
            cpuid: vec![vendor, leaf(1, [0, 0, 1 << 20 | 1 << 28, 1 | 1 << 9])],
            cpus: 1,
            cpus: vm.config().cpus,
            let (guest, host) = (self.tsc_khz, host.tsc_khz);
            let (guest, host) = (self.xsave_size, host.xsave_size);
            max_cpus: 8,
            max_cpus: u16::try_from(kvm.get_max_vcpus()).unwrap_or(u16::MAX),
            msrs: host.msrs.clone(),
            msrs: msr::indices(&kvm, &vcpu)?,
            msrs: vec![0x10, 0x174],
            msrs: vm.msrs().to_vec(),
            refusals.push(format!("the guest has {guest} bytes of extended processor state, this host keeps {host}"));
            refusals.push(format!("the guest has {} vCPUs, this host's KVM takes {}", self.cpus, host.max_cpus));
            refusals.push(format!("the guest runs on a processor of {guest_vendor}, this host has one of {host_vendor}"));
            refusals.push(format!("the guest's TSC runs at {guest} kHz, this host's at {host} kHz, and this host cannot scale it"));
            refusals.push(format!("this host's KVM does not have these MSRs of the guest: {}", unknown.join(", ")));
            refusals.push(format!("this host's processor or KVM lacks features that the guest may use: {}", missing.join(", ")));
            tsc_khz: 2_000_400,
            tsc_khz: host.tsc_khz,
            tsc_khz: vcpu.get_tsc_khz().map_err(VmError::kvm("KVM_GET_TSC_KHZ"))?,
            tsc_khz: vm.tsc_khz(),
            tsc_scaling: false,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            xsave_size: 4096,
            xsave_size: host.xsave_size,
            xsave_size: u32::try_from(save_vcpu::xsave_size(&vm)?).unwrap_or(u32::MAX),
            xsave_size: u32::try_from(vm.xsave_size()).unwrap_or(u32::MAX),
        (MachineFacts { cpuid, cpus: 2, tsc_khz: 2_000_000, msrs: vec![0x10], xsave_size: 4096 }, host)
        MachineFacts {
        Ok(HostFacts {
        ["GenuineIntel", "9 vCPUs", ": avx", "2001000 kHz", "0x6e0", "4097 bytes"].into_iter().for_each(told);
        assert_eq!(facts.refusals(&host), [""; 0]);
        assert_eq!(facts.refusals(&host).len(), 5);
        assert_eq!(refusals.len(), 6);
        facts.cpus = 9;
        facts.msrs.push(0x6e0);
        facts.xsave_size += 1;
        function: entry.function,
        host.cpuid[0].registers[1] += 1;
        host.cpuid[1].registers[2] = 1 << 20;
        host.tsc_khz = 2_001_000;
        host.tsc_scaling = true;
        if !host.tsc_scaling && u64::from(self.tsc_khz.abs_diff(host.tsc_khz)) > tolerance {
        if !missing.is_empty() {
        if !unknown.is_empty() {
        if guest_vendor != host_vendor {
        if self.cpus > host.max_cpus {
        if self.xsave_size > host.xsave_size {
        index: entry.index,
        let (facts, host) = pair();
        let (guest_vendor, host_vendor) = (vendor(&self.cpuid), vendor(&host.cpuid));
        let (mut facts, mut host) = pair();
        let base = cpuid::base(&kvm)?;
        let bits = |leaves| registers(leaves, function, index).get(register).copied().unwrap_or(0);
        let cpuid = vec![vendor, leaf(1, [0, 0, 1 << 20 | 1 << 27 | 1 << 28, 1])];
        let facts = MachineFacts {
        let host = HostFacts {
        let host = HostFacts::read().unwrap();
        let known: BTreeSet<u32> = host.msrs.iter().copied().collect();
        let kvm = Kvm::new().map_err(VmError::Open)?;
        let lacking = bits(guest) & !bits(host) & !ignored;
        let leaf = |function, registers| CpuidLeaf { function, index: 0, registers };
        let missing = missing_features(&self.cpuid, &host.cpuid);
        let mut refusals = Vec::new();
        let refusals = facts.refusals(&host);
        let told = |what: &str| assert!(refusals.iter().any(|refusal| refusal.contains(what)), "{what}: {refusals:?}");
        let tolerance = u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM / 1_000_000;
        let unknown: Vec<String> = self.msrs.iter().filter(|index| !known.contains(index)).map(|index| format!("{index:#x}")).collect();
        let vcpu = vm.create_vcpu(0).map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
        let vendor = leaf(0, [13, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        let vm = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        missing.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| name(function, index, register, bit)));
        refusals
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        vcpu.set_cpuid2(&cpuid::for_vcpu(&base, 0, 1)?).map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        vm.create_irq_chip().map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
        }
        })
        };
    #[test]
    (0x4000_0001, 0, 0, 0),
    (0x8000_0001, 0, 2, 0),
    (0x8000_0001, 0, 2, 5, "abm"),
    (0x8000_0001, 0, 2, 6, "sse4a"),
    (0x8000_0001, 0, 3, 0),
    (0x8000_0001, 0, 3, 20, "nx"),
    (0x8000_0001, 0, 3, 26, "pdpe1gb"),
    (0x8000_0001, 0, 3, 27, "rdtscp"),
    (0x8000_0007, 0, 3, 0),
    (0x8000_0008, 0, 1, 0),
    (0x8000_0008, 0, 1, 12, "ibpb"),
    (0x8000_0021, 0, 0, 0),
    (0xc000_0001, 0, 3, 0),
    (0xd, 0, 0, 0),
    (0xd, 0, 3, 0),
    (0xd, 1, 0, 0),
    (0xd, 1, 0, 1, "xsavec"),
    (0xd, 1, 0, 3, "xsaves"),
    (0xd, 1, 2, 0),
    (1, 0, 2, 0, "sse3"),
    (1, 0, 2, 1 << 27),
    (1, 0, 2, 1, "pclmulqdq"),
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
    (1, 0, 2, 9, "ssse3"),
    (1, 0, 3, 0),
    (7, 0, 1, 0),
    (7, 0, 1, 0, "fsgsbase"),
    (7, 0, 1, 10, "invpcid"),
    (7, 0, 1, 16, "avx512f"),
    (7, 0, 1, 17, "avx512dq"),
    (7, 0, 1, 18, "rdseed"),
    (7, 0, 1, 19, "adx"),
    (7, 0, 1, 20, "smap"),
    (7, 0, 1, 23, "clflushopt"),
    (7, 0, 1, 29, "sha_ni"),
    (7, 0, 1, 3, "bmi1"),
    (7, 0, 1, 30, "avx512bw"),
    (7, 0, 1, 31, "avx512vl"),
    (7, 0, 1, 5, "avx2"),
    (7, 0, 1, 7, "smep"),
    (7, 0, 1, 8, "bmi2"),
    (7, 0, 1, 9, "erms"),
    (7, 0, 2, 1 << 4),
    (7, 0, 2, 16, "la57"),
    (7, 0, 2, 2, "umip"),
    (7, 0, 2, 3, "pku"),
    (7, 0, 2, 9, "vaes"),
    (7, 0, 3, 0),
    (7, 0, 3, 26, "spec_ctrl"),
    (7, 0, 3, 31, "ssbd"),
    (7, 1, 0, 0),
    (7, 1, 3, 0),
    (7, 2, 3, 0),
    /// Asks this host's KVM, on a machine of one vCPU made for the purpose.
    /// Bytes of extended processor state.
    /// EAX on entry.
    /// EAX, EBX, ECX and EDX on return.
    /// ECX on entry.
    /// Everything that `host` lacks, one sentence each; none if the guest can run there.
    /// Most vCPUs of one guest.
    /// Number of vCPUs.
    /// Rate of the TSC in kHz.
    /// Rate of the guest's TSC in kHz.
    /// The MSRs that a vCPU has here.
    /// The MSRs whose values move.
    /// The facts of `vm`, in any state.
    /// The processor as it was given to the guest, before the vCPUs were numbered.
    /// The processor that a guest would get here.
    /// Whether a guest's TSC can run at another rate.
    String::from_utf8_lossy(&bytes).into_owned()
    entries.iter().map(leaf).collect()
    fn a_host_that_offers_more_is_accepted() {
    fn everything_that_is_lacking_is_told() {
    fn pair() -> (MachineFacts, HostFacts) {
    fn this_host_accepts_what_it_runs() {
    for (function, index, register, ignored) in FEATURE_REGISTERS {
    known.map_or_else(|| format!("CPUID {function:#x}.{index} {letter} bit {bit}"), |known| known.4.to_owned())
    leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).map_or([0; 4], |leaf| leaf.registers)
    let [_, ebx, ecx, edx] = registers(leaves, 0, 0);
    let bytes: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    let known = NAMES.iter().find(|known| (known.0, known.1, known.2, known.3) == (function, index, register, bit));
    let leaf = |entry: &kvm_cpuid_entry2| CpuidLeaf {
    let letter = ["EAX", "EBX", "ECX", "EDX"].get(register).copied().unwrap_or_default();
    let mut missing = Vec::new();
    missing
    pub cpuid: Vec<CpuidLeaf>,
    pub cpus: u16,
    pub fn of<S>(vm: &Vm<S>) -> Self {
    pub fn read() -> Result<Self, VmError> {
    pub fn refusals(&self, host: &HostFacts) -> Vec<String> {
    pub function: u32,
    pub index: u32,
    pub max_cpus: u16,
    pub msrs: Vec<u32>,
    pub registers: [u32; 4],
    pub tsc_khz: u32,
    pub tsc_scaling: bool,
    pub xsave_size: u32,
    use super::*;
    }
    };
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[derive(Clone, Debug, PartialEq, Eq)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[derive(Clone, Debug, Serialize, Deserialize)]
//! What a guest needs of its host, told before the guest is disturbed: the source sends [`MachineFacts`], the destination holds them
//! What a guest needs of its host.
//! against its own [`HostFacts`] and answers with everything that it lacks.
/// A CPUID leaf's registers.
/// KVM runs a guest without TSC scaling if the rates differ by no more than this (`tsc_tolerance_ppm`).
/// Registers of CPUID whose bits are features: leaf, subleaf, which register (0 is EAX), and the bits that follow the guest's own settings
/// The features that people know by name: leaf, subleaf, register, bit, name as in /proc/cpuinfo.
/// What a guest needs of its host.
/// What a running guest relies on.
/// What this host offers to a guest.
/// and so say nothing about the processor (OSXSAVE, OSPKE).
];
const FEATURE_REGISTERS: [(u32, u32, usize, u32); 19] = [
const NAMES: [(u32, u32, usize, u32, &str); 47] = [
const TSC_TOLERANCE_PPM: u64 = 250;
fn leaves(entries: &[kvm_cpuid_entry2]) -> Vec<CpuidLeaf> {
fn missing_features(guest: &[CpuidLeaf], host: &[CpuidLeaf]) -> Vec<String> {
fn name(function: u32, index: u32, register: usize, bit: u32) -> String {
fn registers(leaves: &[CpuidLeaf], function: u32, index: u32) -> [u32; 4] {
fn vendor(leaves: &[CpuidLeaf]) -> String {
impl HostFacts {
impl MachineFacts {
mod tests {
pub struct CpuidLeaf {
pub struct HostFacts {
pub struct MachineFacts {
pub struct MachineFacts {}
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use super::{Vm, VmError, cpuid, msr, save_vcpu};
}
