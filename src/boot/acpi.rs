//! ACPI tables (ACPI 6.5): how the guest finds its processors, virtio devices, serial port and power button. Hardware-reduced: no PM1
//! registers, no SCI, no FACS.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::vm::layout::{
    COM1_GSI, COM1_PORT, COM1_PORTS, GED_GSI, IOAPIC, LAPIC, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
    VIRTIO_SIZE, virtio_slot,
};

const OEM: [u8; 6] = *b"FERRY ";
const OEM_TABLE: [u8; 8] = *b"FERRYVM ";
const OEM_REVISION: u32 = 1;

/// The largest APIC ID that the 8-bit entries of the MADT can name; 255 means all processors.
const LAST_XAPIC_ID: u32 = 254;

/// All tables as one block for guest address `base`, the RSDP first, for `cpus` processors and virtio devices in `slots`.
pub fn tables(base: u64, cpus: u16, slots: &[usize]) -> Vec<u8> {
    let mut block = vec![0; align(Rsdp::len())];
    let dsdt = append(&mut block, base, dsdt(slots).as_slice());
    let fadt = append(&mut block, base, &bytes(&fadt(dsdt)));
    let madt = append(&mut block, base, madt(cpus).as_slice());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut block, base, &bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    for (to, from) in block.iter_mut().zip(rsdp) {
        *to = from;
    }
    block
}

/// Appends a table, aligned; returns its guest address.
fn append(block: &mut Vec<u8>, base: u64, table: &[u8]) -> u64 {
    let address = base + block.len() as u64;
    block.extend_from_slice(table);
    block.resize(align(block.len()), 0);
    address
}

const fn align(length: usize) -> usize {
    length.next_multiple_of(16)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed ACPI Description Table (section 5.2.9): the sleep and reset registers.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // The power button is a device of the DSDT, not a fixed register.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Multiple APIC Description Table (section 5.2.12): one entry per processor, whose APIC ID is its vCPU number, and the I/O APIC.
fn madt(cpus: u16) -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    let mut body = Vec::new();
    body.extend_from_slice(&(LAPIC as u32).to_le_bytes());
    // There is a pair of 8259s beside the APICs.
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..u32::from(cpus) {
        if id <= LAST_XAPIC_ID {
            ProcessorLocalApic::new(id as u8, id as u8, EnabledStatus::Enabled).to_aml_bytes(&mut body);
        } else {
            // Processor Local x2APIC structure (section 5.2.12.12): type 9, length 16, reserved, APIC ID, flags (enabled), processor UID.
            body.extend_from_slice(&[9, 16, 0, 0]);
            for field in [id, 1, id] {
                body.extend_from_slice(&field.to_le_bytes());
            }
        }
    }
    IoApic::new(0, IOAPIC as u32, 0).to_aml_bytes(&mut body);
    madt.append_slice(&body);
    madt
}

/// Differentiated System Description Table: devices that are not found by probing.
fn dsdt(slots: &[usize]) -> Sdt {
    let mut devices = serial();
    for slot in slots {
        devices.extend(virtio(*slot));
    }
    devices.extend(power_button());
    let s5 = Package::new(vec![&SLEEP_TYPE_S5]);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &s5)));
    dsdt
}

/// A device with hardware ID `hid`, instance `uid` and what else it `has`.
fn device(name: &str, hid: &dyn Aml, uid: u8, has: &[&dyn Aml]) -> Vec<u8> {
    let (hid, uid) = (Name::new("_HID".into(), hid), Name::new("_UID".into(), &uid));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    children.extend(has);
    bytes(&Device::new(name.into(), children))
}

/// `_CRS`: edge-triggered interrupt `gsi`, active high and not shared, and `registers`.
fn resources(registers: Option<&dyn Aml>, gsi: u32) -> Name {
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let mut list: Vec<&dyn Aml> = registers.into_iter().collect();
    list.push(&interrupt);
    Name::new("_CRS".into(), &ResourceTemplate::new(list))
}

/// COM1, so that the guest finds its interrupt without a legacy interrupt controller.
fn serial() -> Vec<u8> {
    let ports = IO::new(COM1_PORT as u16, COM1_PORT as u16, 1, COM1_PORTS as u8);
    let description = Name::new("_DDN".into(), &"COM1");
    device("COM1", &EISAName::new("PNP0501"), 0, &[&description, &resources(Some(&ports), COM1_GSI)])
}

/// A virtio-mmio device as Linux's virtio_mmio driver binds to it (`LNRO0005`). Its DMA is cache coherent.
fn virtio(slot: usize) -> Vec<u8> {
    let Some((address, gsi)) = virtio_slot(slot) else { return Vec::new() };
    let registers = Memory32Fixed::new(true, address.0 as u32, VIRTIO_SIZE as u32);
    let coherent = Name::new("_CCA".into(), &aml::ONE);
    device(&format!("VR{slot:02}"), &"LNRO0005", slot as u8, &[&coherent, &resources(Some(&registers), gsi)])
}

/// The power button, and the generic event device (section 5.6.9) whose one interrupt means that it was pressed.
fn power_button() -> Vec<u8> {
    const PRESSED: u8 = 0x80;
    let button_path = Path::new("PWRB");
    let notify = Notify::new(&button_path, &PRESSED);
    let event = Method::new("_EVT".into(), 1, true, vec![&notify]);
    let mut devices = device("PWRB", &EISAName::new("PNP0C0C"), 0, &[]);
    devices.extend(device("GED_", &"ACPI0013", 0, &[&resources(None, GED_GSI), &event]));
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find<'a>(block: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
        let start = (0..block.len()).step_by(16).find(|start| block[*start..].starts_with(signature)).unwrap();
        let length = u32::from_le_bytes(block[start + 4..start + 8].try_into().unwrap()) as usize;
        &block[start..start + length]
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        const BASE: u64 = 0xe0000;
        let block = tables(BASE, 300, &[0, 1, 11]);
        assert!(block.len() < 0x20000);
        assert_eq!(&block[..8], b"RSD PTR ");
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
        for signature in [b"XSDT", b"FACP", b"APIC", b"DSDT"] {
            assert_eq!(sum(find(&block, signature)), 0, "{signature:?}");
        }
        let address = |bytes: &[u8]| (u64::from_le_bytes(bytes.try_into().unwrap()) - BASE) as usize;
        let xsdt = address(&block[24..32]);
        assert_eq!(&block[xsdt..xsdt + 4], b"XSDT");
        let fadt = address(&block[xsdt + 36..xsdt + 44]);
        assert_eq!(&block[fadt..fadt + 4], b"FACP");
        let dsdt = address(&block[fadt + 140..fadt + 148]);
        assert_eq!(&block[dsdt..dsdt + 4], b"DSDT");
        let madt = address(&block[xsdt + 44..xsdt + 52]);
        assert_eq!(&block[madt..madt + 4], b"APIC");
        // 255 local APICs of 8 bytes, 45 x2APICs of 16, one I/O APIC of 12.
        assert_eq!(find(&block, b"APIC").len(), 44 + 255 * 8 + 45 * 16 + 12);
    }
}
