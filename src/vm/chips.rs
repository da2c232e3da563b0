//! The interrupt controllers and the timer inside KVM: creating, saving and restoring.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config};
use kvm_ioctls::VmFd;

use super::VmError;
use super::state::{Abi, ChipState};

/// Creates the chips, before the vCPUs.
pub fn create(vm: &VmFd) -> Result<(), VmError> {
    vm.create_irq_chip().map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
    // The dummy speaker is port 0x61, which guests read to see the timer run.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmError::kvm("KVM_CREATE_PIT2"))
}

/// Reads the chips, after the vCPUs: reading those may still deliver interrupts.
pub fn save(vm: &VmFd) -> Result<ChipState, VmError> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(VmError::kvm("KVM_GET_IRQCHIP")).map(|()| Abi(chip))
    };
    Ok(ChipState {
        pit: Abi(vm.get_pit2().map_err(VmError::kvm("KVM_GET_PIT2"))?),
        pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
    })
}

/// Writes the chips, after the vCPUs: the I/O APIC delivers what is pending to their local APICs at once. The timer comes first, because
/// starting it may raise its line, which the controllers' saved state then overrides.
pub fn restore(vm: &VmFd, state: &ChipState) -> Result<(), VmError> {
    vm.set_pit2(&state.pit.0).map_err(VmError::kvm("KVM_SET_PIT2"))?;
    let chips =
        [(KVM_IRQCHIP_PIC_MASTER, &state.pic_master), (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave), (KVM_IRQCHIP_IOAPIC, &state.ioapic)];
    for (chip_id, Abi(chip)) in chips {
        vm.set_irqchip(&kvm_irqchip { chip_id, ..*chip }).map_err(VmError::kvm("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}
