//! A paused machine as data, and its encoding. What is decoded is hostile input: lengths are exact or bounded, nothing panics, and no
//! more is allocated than the input is long.

use std::fmt;
use std::marker::PhantomData;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::clock::ClockState;
use super::msr::Msr;
use crate::device::DeviceState;

const MAGIC: [u8; 4] = *b"FRYM";
/// Version of the encoding. Every change to a structure here is a new one.
const VERSION: u16 = 1;

/// Why saved state cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// Not a machine state, or of another version.
    #[error("it does not begin with the header of version {VERSION}; both sides must run the same version of Ferry")]
    Header,
    /// It does not decode, or has bytes left over.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// The number of vCPUs differs.
    #[error("it has {saved} vCPUs, the machine has {machine}")]
    Cpus {
        /// In the state.
        saved: usize,
        /// In the machine.
        machine: usize,
    },
    /// It holds a device that the machine lacks, or lacks one that the machine has.
    #[error("the state and the machine do not both have device {0}")]
    Devices(String),
    /// The extended processor state is larger than here.
    #[error("its XSAVE area has {saved} bytes, this host takes {host}")]
    Xsave {
        /// In the state.
        saved: usize,
        /// On this host.
        host: usize,
    },
    /// An MSR that this machine does not have.
    #[error("it sets MSR {0:#x}, which this host does not have")]
    Msr(u32),
}

/// A KVM structure, encoded as its bytes; decoding demands exactly as many.
#[derive(Clone, Copy, Debug, Default)]
pub struct Abi<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Abi<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0.as_bytes())
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Abi<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes<T>(PhantomData<T>);
        impl<T: FromBytes> Visitor<'_> for Bytes<T> {
            type Value = Abi<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                write!(formatter, "{} bytes", size_of::<T>())
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Abi<T>, E> {
                T::read_from_bytes(bytes).map(Abi).map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }
        deserializer.deserialize_bytes(Bytes(PhantomData))
    }
}

/// One vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(Default))]
pub struct VcpuState {
    pub(super) mp_state: Abi<kvm_mp_state>,
    pub(super) regs: Abi<kvm_regs>,
    pub(super) sregs: Abi<kvm_sregs>,
    /// The XSAVE area in its standard form, as long as KVM_CAP_XSAVE2 says.
    #[serde(with = "serde_bytes")]
    pub(super) xsave: Vec<u8>,
    pub(super) xcrs: Abi<kvm_xcrs>,
    pub(super) debug_regs: Abi<kvm_debugregs>,
    pub(super) lapic: Abi<kvm_lapic_state>,
    pub(super) tsc_khz: u32,
    /// The guest's TSC less the host's (after scaling), where KVM tells it.
    pub(super) tsc_offset: Option<u64>,
    pub(super) cpuid: Vec<Abi<kvm_cpuid_entry2>>,
    /// In the order of [`super::msr::indices`].
    pub(super) msrs: Vec<Msr>,
    pub(super) events: Abi<kvm_vcpu_events>,
}

/// The interrupt controllers and the timer that KVM emulates.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChipState {
    pub(super) pic_master: Abi<kvm_irqchip>,
    pub(super) pic_slave: Abi<kvm_irqchip>,
    pub(super) ioapic: Abi<kvm_irqchip>,
    pub(super) pit: Abi<kvm_pit_state2>,
}

/// A paused machine without its RAM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What the guest's first host gave to every vCPU before it was numbered; see [`super::facts::MachineFacts`].
    pub(super) cpuid: Vec<Abi<kvm_cpuid_entry2>>,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) chips: ChipState,
    pub(super) clock: ClockState,
    pub(super) devices: Vec<DeviceState>,
}

impl MachineState {
    /// Encodes the state: magic number, version, postcard.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        let mut bytes = Vec::from(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        postcard::to_extend(self, bytes).map_err(|error| StateError::Damaged(error.to_string()))
    }

    /// Decodes what [`MachineState::to_bytes`] made; every byte must be used.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let body = bytes.strip_prefix(&MAGIC).and_then(|rest| rest.strip_prefix(&VERSION.to_le_bytes())).ok_or(StateError::Header)?;
        match postcard::take_from_bytes(body) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(StateError::Damaged(format!("{} bytes are left over", rest.len()))),
            Err(error) => Err(StateError::Damaged(error.to_string())),
        }
    }
}
