//! What the guest did to leave KVM_RUN, and what is done about it.

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::events::VmEvent;
use crate::device::bus::Bus;
use crate::memory::dirty_tracker::Tracking;

/// The two address spaces a vCPU reaches devices by.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Guest addresses outside RAM.
    pub mmio: Bus,
}

/// What one KVM_RUN came to.
pub enum Outcome {
    /// An access was carried out; KVM finishes the instruction when it is entered again.
    Handled,
    /// A signal, or `immediate_exit`: nothing is left to finish.
    Interrupted,
    /// The guest ended by a call to the hypervisor.
    Ended(VmEvent),
    /// The vCPU cannot go on, for this reason.
    Stuck(String),
}

/// Enters the guest once and carries out what it asks of devices, and what KVM asks of `tracking`.
pub fn run_once(vcpu: &mut VcpuFd, buses: &Buses, tracking: &Tracking) -> Outcome {
    let run: *const kvm_run = vcpu.get_kvm_run();
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            for value in data.chunks_exact(port_access_size(run)) {
                buses.ports.write(port.into(), value);
            }
            Outcome::Handled
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            for value in data.chunks_exact_mut(port_access_size(run)) {
                buses.ports.read(port.into(), value);
            }
            Outcome::Handled
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.mmio.read(address, data);
            Outcome::Handled
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            buses.mmio.write(address, data);
            Outcome::Handled
        }
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => make_room(tracking),
        Ok(VcpuExit::Intr) => Outcome::Interrupted,
        Ok(VcpuExit::Shutdown) => Outcome::Stuck("triple fault: the guest has no handler for an exception".into()),
        Ok(VcpuExit::InternalError) => Outcome::Stuck(internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            Outcome::Stuck(format!("the processor refused to enter the guest: hardware reason {reason:#x} on host CPU {cpu}"))
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Outcome::Ended(VmEvent::PowerOff),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Outcome::Ended(VmEvent::Reset),
        Ok(VcpuExit::SystemEvent(kind, _)) => Outcome::Stuck(format!("KVM reported system event {kind}, which a PC does not have")),
        Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
            Outcome::Stuck(format!("KVM found no usable memory behind guest address {gpa:#x}+{size:#x}"))
        }
        Ok(VcpuExit::Unsupported(reason)) => Outcome::Stuck(format!("KVM left the guest with exit reason {reason}, unknown here")),
        Ok(exit) => Outcome::Stuck(format!("KVM left the guest with {exit:?}, which was not asked for")),
        Err(error) => match error.errno() {
            libc::EINTR => Outcome::Interrupted,
            // An application processor that waits for its start-up interrupt got one: enter again.
            libc::EAGAIN => Outcome::Handled,
            libc::EFAULT => Outcome::Stuck("KVM could not reach guest memory: the host has no page for it, or lost the one it had".into()),
            _ => Outcome::Stuck(format!("KVM_RUN failed: {error}")),
        },
    }
}

/// Empties a dirty ring that keeps its vCPU out of the guest. Nothing of the guest's is in flight then.
fn make_room(tracking: &Tracking) -> Outcome {
    match tracking {
        Tracking::Ring(rings) => rings.collect().map_or_else(|error| Outcome::Stuck(error.to_string()), |()| Outcome::Handled),
        Tracking::Log(_) => Outcome::Stuck("KVM says that a dirty ring is full, but this machine has none".into()),
    }
}

/// Bytes of one access of a port exit: a repeated instruction makes many in one exit.
fn port_access_size(run: *const kvm_run) -> usize {
    // SAFETY: the caller's vCPU owns the mapping, KVM has just filled in the union for a port exit, and nobody writes it now.
    let size = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(size.max(1))
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit reason, which came from the kernel, says which member of the union is filled in.
    let failure = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.emulation_failure };
    match failure.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            // SAFETY: the union has one member; its bytes mean something only if the flag below is set.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let known = failure.ndata >= 1 && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
            let count = if known { usize::from(instruction.insn_size).min(instruction.insn_bytes.len()) } else { 0 };
            let bytes: Vec<String> = instruction.insn_bytes.iter().take(count).map(|byte| format!("{byte:02x}")).collect();
            let rip = vcpu.get_regs().map_or_else(|_| "?".into(), |regs| format!("{:#x}", regs.rip));
            let what = if bytes.is_empty() { "not reported".into() } else { bytes.join(" ") };
            let mut reason = format!("KVM could not emulate the instruction at {rip} (bytes: {what})");
            if emulates_ring_0() {
                reason += "; this host has neither VMX nor SVM, so its KVM emulates all of guest ring 0 and knows only part of the \
                           instruction set: run this guest on a host with hardware virtualization";
            }
            reason
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception while it delivered another one".into(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an event to the guest".into(),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "the processor left the guest for a reason that KVM does not know".into(),
        other => format!("KVM internal error {other}"),
    }
}

/// Whether this host's KVM runs without VMX and SVM and so emulates the guest's kernel mode in software.
pub fn emulates_ring_0() -> bool {
    let Ok(cpuinfo) = std::fs::read_to_string("/proc/cpuinfo") else { return false };
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.next().is_some_and(|line| !line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}
