//! Where things are in the guest: addresses, ports and interrupt lines. Both sides of a migration are built from these constants.

use vm_memory::GuestAddress;

/// I/O APIC registers, at the address every PC has them.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC registers, at the architecture's reset value.
pub const LAPIC: u64 = 0xfee0_0000;
/// The page that Intel hosts without unrestricted guests need for an identity map (KVM_SET_IDENTITY_MAP_ADDR), in the hole.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages that Intel hosts need for a task state segment (KVM_SET_TSS_ADDR), after [`IDENTITY_MAP`].
pub const TSS: u64 = 0xfffb_d000;

/// First virtio-mmio slot's registers.
const VIRTIO_BASE: u64 = 0xd000_0000;
/// Size of one slot's registers in bytes.
pub const VIRTIO_SIZE: u64 = 0x1000;
/// How many virtio-mmio slots there are.
pub const VIRTIO_SLOTS: usize = 12;
/// GSIs of the slots: 8 is the RTC's, 9 is [`GED_GSI`]'s.
const VIRTIO_GSI: [u32; VIRTIO_SLOTS] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18];

/// First port of COM1.
pub const COM1_PORT: u64 = 0x3f8;
/// Ports of a 16550A.
pub const COM1_PORTS: u64 = 8;
/// GSI of COM1.
pub const COM1_GSI: u32 = 4;

/// GSI of the ACPI generic event device, which reports the power button.
pub const GED_GSI: u32 = 9;
/// ACPI SLEEP_CONTROL_REG; SLEEP_STATUS_REG and RESET_REG follow it.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI SLEEP_STATUS_REG.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI RESET_REG.
pub const RESET_PORT: u16 = 0x602;
/// What the guest writes to [`RESET_PORT`] to be reset.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// CMOS index and data ports.
pub const CMOS_PORT: u64 = 0x70;
/// Keyboard controller data port; its command port is at [`I8042_COMMAND`] from here.
pub const I8042_PORT: u64 = 0x60;
/// First port of the system control port, emulated in the kernel with the PIT, which parts the keyboard controller's two ports.
pub const I8042_COMMAND: u64 = 0x64;

/// Registers and GSI of virtio-mmio slot `slot`, or nothing from [`VIRTIO_SLOTS`] on.
pub fn virtio_slot(slot: usize) -> Option<(GuestAddress, u32)> {
    let gsi = *VIRTIO_GSI.get(slot)?;
    Some((GuestAddress(VIRTIO_BASE + slot as u64 * VIRTIO_SIZE), gsi))
}
