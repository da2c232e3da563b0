//! A destination that is played by hand, frame by frame, so that it can break off anywhere.

use std::time::Instant;

use super::hosts::{LIMIT, PAGE_CHANNELS};
use crate::migrate::driver::frames;
use crate::migrate::transport::{Address, Connection, Interrupt, Listener, Reader, Writer};
use crate::migrate::wire::{Channel, Frame, Hello, Kind};

/// How far the played destination goes before it closes both connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    Hello,
    Setup,
    Prepared,
    /// The first pass has come, and is not acknowledged.
    PassEnd,
    Switchover,
    /// READY was sent and COMMIT has come.
    Commit,
}

pub struct Peer {
    listener: Listener,
    interrupt: Interrupt,
}

impl Peer {
    pub fn new() -> (Self, Address) {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().clone();
        (Peer { listener, interrupt: Interrupt::new().unwrap() }, address)
    }

    fn accept(&self) -> (Reader, Writer) {
        let connection: Connection = self.listener.accept(&self.interrupt, Some(Instant::now() + LIMIT)).unwrap();
        connection.split()
    }

    /// A connection for pages, whose pages are read away.
    fn accept_pages(&self) -> Writer {
        let (mut reader, writer) = self.accept();
        assert!(matches!(next(&mut reader), Frame::Hello(Hello { channel: Channel::Pages(_), .. })));
        std::thread::spawn(move || while reader.read_exact(&mut [0; 4096], None).is_ok() {});
        writer
    }

    /// Gets ready and then reads nothing until `held` is closed. Then it reads on to the end, and tells the reason if it is given one.
    pub fn stall(self, held: &crossbeam_channel::Receiver<()>) -> Option<String> {
        let (mut reader, mut writer) = self.accept();
        assert!(matches!(next(&mut reader), Frame::Hello(_)));
        frames::send(&mut writer, &Frame::Welcome("played".into()), None).unwrap();
        let _others: Vec<_> = (0..1 + PAGE_CHANNELS).map(|_| self.accept()).collect();
        frames::send(&mut writer, &Frame::Prepared, None).unwrap();
        assert!(held.recv_timeout(LIMIT).is_err_and(|error| error.is_disconnected()));
        loop {
            if let Frame::Abort(reason) = frames::read(&mut reader, |_| true, Some(Instant::now() + LIMIT)).ok()? {
                return Some(reason);
            }
        }
    }

    /// Plays until then, and is gone.
    pub fn play(self, until: Until) {
        drop(self.play_on(until));
    }

    /// Plays until then, and says nothing more; its connections.
    pub fn play_on(&self, until: Until) -> Vec<(Reader, Writer)> {
        let (mut reader, mut writer) = self.accept();
        let said = |writer: &mut Writer, frame: Frame| frames::send(writer, &frame, Some(Instant::now() + LIMIT)).unwrap();
        assert!(matches!(next(&mut reader), Frame::Hello(_)));
        if until == Until::Hello {
            return vec![(reader, writer)];
        }
        said(&mut writer, Frame::Welcome("played".into()));
        wait_for(&mut reader, Kind::Setup);
        if until == Until::Setup {
            return vec![(reader, writer)];
        }
        let (mut urgent, urgent_writer) = self.accept();
        assert!(matches!(next(&mut urgent), Frame::Hello(_)));
        let _for_pages: Vec<_> = (0..PAGE_CHANNELS).map(|_| self.accept_pages()).collect();
        said(&mut writer, Frame::Prepared);
        if until == Until::Prepared {
            return vec![(reader, writer), (urgent, urgent_writer)];
        }
        loop {
            match next(&mut reader) {
                Frame::PassEnd(_) if until == Until::PassEnd => return vec![(reader, writer), (urgent, urgent_writer)],
                Frame::PassEnd(_) => drop(said(&mut writer, Frame::PassAck)),
                Frame::Switchover(_) => break,
                _ => {}
            }
        }
        if until == Until::Switchover {
            return vec![(reader, writer), (urgent, urgent_writer)];
        }
        said(&mut writer, Frame::Ready { load_us: 1, warnings: Vec::new() });
        wait_for(&mut reader, Kind::Commit);
        vec![(reader, writer), (urgent, urgent_writer)]
    }
}

fn next(reader: &mut Reader) -> Frame {
    frames::read(reader, |_| true, Some(Instant::now() + LIMIT)).unwrap()
}

fn wait_for(reader: &mut Reader, kind: Kind) {
    while next(reader).kind() != kind {}
}
