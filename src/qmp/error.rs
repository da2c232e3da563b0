//! Errors as QMP puts them on the wire.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// QEMU's error classes (`QapiErrorClass` in QEMU's qapi/error.json).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// There is no such command, or not in this state of the session.
    CommandNotFound,
    /// The device is not active, or there is nothing for the command to act on.
    DeviceNotActive,
    /// There is no device or node of this name.
    DeviceNotFound,
    /// What the command needs is not there (KVM, in QEMU).
    KVMMissingCap,
}

/// Why a command failed: the `error` member of a QMP response.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{desc}")]
pub struct QmpError {
    /// For programs; nearly always [`ErrorClass::GenericError`].
    pub class: ErrorClass,
    /// For people: what failed, why, and what to do.
    pub desc: String,
}

impl QmpError {
    /// An error of class [`ErrorClass::GenericError`].
    pub fn generic(desc: impl Into<String>) -> Self {
        QmpError { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// An error of class [`ErrorClass::CommandNotFound`].
    pub fn command_not_found(desc: impl Into<String>) -> Self {
        QmpError { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }

    /// There is no disk with this id: QEMU's words, and its class.
    pub fn device_not_found(id: &str) -> Self {
        QmpError::generic(format!("Cannot find device='{id}' nor node-name='{id}'"))
    }
}
