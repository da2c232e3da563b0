//! COM1, a 16550A. Output goes to a writer; input waits in a bounded buffer until the guest reads it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::{Device, DeviceError, DeviceState};

/// How many bytes of input wait for the guest beyond the UART's own FIFO.
const BACKLOG: usize = 4096;
/// The UART's receive FIFO in bytes, as vm-superio has it.
const FIFO: usize = 64;
const VERSION: u16 = 1;
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;

/// Raises the serial port's interrupt line through KVM's irqfd.
pub struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), std::io::Error> {
        self.0.write(1)
    }
}

type Output = Box<dyn Write + Send>;

/// The registers, as a vCPU reaches them.
pub struct Uart {
    serial: Serial<Interrupt, NoEvents, Output>,
    interrupt: Arc<EventFd>,
    backlog: VecDeque<u8>,
    /// Input waits outside, so that the state that is saved stays the last one.
    paused: bool,
}

/// The serial port as the rest of the machine sees it.
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    /// Told when the guest has made room for input.
    room: Arc<Condvar>,
}

/// The bus end of the port.
pub struct SerialRegisters {
    uart: Arc<Mutex<Uart>>,
    room: Arc<Condvar>,
}

/// Saved state, version 1.
#[derive(Serialize, Deserialize)]
struct Saved {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    backlog: Vec<u8>,
}

impl SerialPort {
    /// A port that raises `interrupt` and writes nowhere.
    pub fn new(interrupt: EventFd) -> Self {
        let interrupt = Arc::new(interrupt);
        let serial = Serial::new(Interrupt(interrupt.clone()), Box::new(std::io::sink()) as Output);
        let uart = Uart { serial, interrupt, backlog: VecDeque::new(), paused: false };
        SerialPort { uart: Arc::new(Mutex::new(uart)), room: Arc::default() }
    }

    /// What goes on the port bus.
    pub fn registers(&self) -> SerialRegisters {
        SerialRegisters { uart: self.uart.clone(), room: self.room.clone() }
    }

    /// Sends the guest's output to `output` from now on and returns the writer used before. The vCPU that writes a byte waits for the
    /// writer, and so does a pause: a writer that may block for long needs a thread of its own. A failing writer loses the byte.
    pub fn set_output(&self, output: Output) -> Output {
        std::mem::replace(self.lock().serial.writer_mut(), output)
    }

    /// Gives `bytes` to the guest as far as there is room. Returns how many were taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        if uart.paused {
            // It would come too late for the saved state.
            return 0;
        }
        let count = bytes.len().min(BACKLOG - uart.backlog.len());
        uart.backlog.extend(bytes.iter().take(count));
        uart.refill();
        count
    }

    /// Waits until [`SerialPort::input`] can take something, at most for `timeout`. Returns whether it can.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let full = |uart: &mut Uart| uart.paused || uart.backlog.len() >= BACKLOG;
        let (uart, _) = self.room.wait_timeout_while(self.lock(), timeout, full).unwrap_or_else(PoisonError::into_inner);
        !uart.paused && uart.backlog.len() < BACKLOG
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Uart {
    /// Moves waiting input into the UART as far as its FIFO has room.
    fn refill(&mut self) {
        let count = self.serial.fifo_capacity().min(self.backlog.len());
        if count > 0 {
            let bytes: Vec<u8> = self.backlog.drain(..count).collect();
            // Fails only for a full FIFO, and there was room.
            let _ = self.serial.enqueue_raw_bytes(&bytes);
        }
    }
}

impl BusDevice for SerialRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, value) in (offset..).zip(data) {
            *value = uart.serial.read(register as u8);
            if register == DATA && !uart.backlog.is_empty() {
                uart.refill();
                self.room.notify_all();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, value) in (offset..).zip(data) {
            // A byte that the writer did not take is lost, as on a line with nobody at its end.
            let _ = uart.serial.write(register as u8, *value);
        }
    }
}

impl Device for SerialPort {
    fn id(&self) -> &str {
        "serial"
    }

    fn pause(&self) -> Result<(), DeviceError> {
        // Output is written by the vCPUs, which are stopped.
        let mut uart = self.lock();
        let _ = uart.serial.writer_mut().flush();
        uart.paused = true;
        Ok(())
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.lock().paused = false;
        self.room.notify_all();
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let uart = self.lock();
        let state = uart.serial.state();
        let saved = Saved {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            fifo: state.in_buffer,
            backlog: uart.backlog.iter().copied().collect(),
        };
        let failed = |error: postcard::Error| DeviceError::Failed { id: self.id().into(), reason: error.to_string() };
        Ok(DeviceState { id: self.id().into(), version: VERSION, state: postcard::to_stdvec(&saved).map_err(failed)? })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), DeviceError> {
        let refused = |reason: String| DeviceError::State { id: self.id().into(), reason };
        if state.version != VERSION {
            return Err(refused(format!("version {} where {VERSION} is known", state.version)));
        }
        let saved: Saved = postcard::from_bytes(&state.state).map_err(|error| refused(error.to_string()))?;
        if saved.fifo.len() > FIFO || saved.backlog.len() > BACKLOG {
            return Err(refused(format!("{} + {} bytes of waiting input", saved.fifo.len(), saved.backlog.len())));
        }
        let registers = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: 0,
            interrupt_identification: SerialState::default().interrupt_identification,
            // Without DLAB, so that the write below reaches IER.
            line_control: 0,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.fifo,
        };
        let mut uart = self.lock();
        let output = std::mem::replace(uart.serial.writer_mut(), Box::new(std::io::sink()));
        let serial = Serial::from_state(&registers, Interrupt(uart.interrupt.clone()), NoEvents, output);
        let mut serial = serial.map_err(|error| refused(format!("{error:?}")))?;
        // An interrupt that was on its way when the guest was paused may not have reached the saved interrupt controller, and vm-superio
        // raises none that it takes for pending: not even when the guest, which masks IER while its kernel prints, enables it again. So
        // nothing is pending here until IER is written, which raises what its conditions call for. One too many does no harm.
        for (register, value) in [(INTERRUPT_ENABLE, saved.interrupt_enable), (LINE_CONTROL, saved.line_control)] {
            serial.write(register, value).map_err(|error| refused(format!("{error:?}")))?;
        }
        uart.serial = serial;
        uart.backlog = saved.backlog.into();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> SerialPort {
        SerialPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn input_beyond_the_buffers_is_refused_until_the_guest_reads() {
        let port = port();
        let mut registers = port.registers();
        let bytes: Vec<u8> = (0..FIFO + BACKLOG + 100).map(|index| index as u8).collect();
        let mut taken = port.input(&bytes);
        taken += port.input(&bytes[taken..]);
        assert_eq!(taken, FIFO + BACKLOG);
        assert!(!port.wait_for_room(Duration::ZERO));
        let mut read = [0];
        registers.read(DATA, &mut read);
        assert!(port.wait_for_room(Duration::ZERO));
        let mut got = vec![read[0]];
        while got.len() < taken {
            registers.read(DATA, &mut read);
            got.push(read[0]);
        }
        assert_eq!(got, bytes[..taken]);
    }

    #[test]
    fn state_moves_with_waiting_input() {
        let source = port();
        source.registers().write(7, &[0x5a]);
        assert_eq!(source.input(&[7; 100]), 100);
        let state = source.save().unwrap();
        let destination = port();
        destination.restore(&state).unwrap();
        assert_eq!(destination.save().unwrap(), state);
        let mut scratch = [0];
        destination.registers().read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
    }

    /// What the driver of Linux does: IER is masked while the kernel prints, and what is pending must come when it is enabled again.
    #[test]
    fn an_interrupt_that_was_lost_on_the_way_comes_again() {
        const TRANSMITTER_EMPTY: u8 = 2;
        const DIVISOR_LATCH: u8 = 0x80;
        let moved = |source: &SerialPort| {
            let destination = port();
            destination.restore(&source.save().unwrap()).unwrap();
            destination
        };
        let raised = |port: &SerialPort| port.lock().interrupt.read().is_ok();
        let write = |port: &SerialPort, register, value| port.registers().write(register, &[value]);
        let source = port();
        write(&source, INTERRUPT_ENABLE.into(), TRANSMITTER_EMPTY);
        assert!(raised(&source));
        assert!(raised(&moved(&source)), "enabled and pending");
        write(&source, LINE_CONTROL.into(), DIVISOR_LATCH);
        let latched = moved(&source);
        assert!(raised(&latched), "enabled and pending behind the divisor latch");
        assert_eq!(latched.save().unwrap(), source.save().unwrap());
        write(&source, LINE_CONTROL.into(), 0);
        write(&source, INTERRUPT_ENABLE.into(), 0);
        let masked = moved(&source);
        assert!(!raised(&masked), "pending and masked");
        write(&masked, INTERRUPT_ENABLE.into(), TRANSMITTER_EMPTY);
        assert!(raised(&masked), "pending and enabled again");
    }

    #[test]
    fn state_that_does_not_fit_is_refused() {
        let mut state = port().save().unwrap();
        state.state.truncate(3);
        assert!(port().restore(&state).is_err());
        let mut state = port().save().unwrap();
        state.version = 2;
        assert!(port().restore(&state).is_err());
    }
}
