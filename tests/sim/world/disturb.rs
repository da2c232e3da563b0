//! What goes wrong by the plan: cuts, deaths, failures.

use ferry::migrate::report::Status;
use ferry::migrate::wire::{Channel, Kind};
use ferry::migrate::{destination, source};

use super::freeze::Side;
use super::{Right, TOO_LONG, World};
use crate::plan::Fault;

impl World {
    pub(super) fn disturb(&mut self) {
        let Some(step) = self.plan_step() else { return };
        let due: Vec<Fault> = self.plan.faults.iter().filter(|(at, _)| *at <= step).map(|(_, fault)| *fault).collect();
        for fault in due {
            if self.happens(fault) {
                self.fails(fault);
            }
        }
    }

    /// This step, as the plan counts.
    fn plan_step(&self) -> Option<u64> {
        self.plan_begins.map(|begin| self.step - begin)
    }

    /// Lets `fault` happen, if it can now.
    fn happens(&mut self, fault: Fault) -> bool {
        match fault {
            Fault::KillSource => {
                self.source.alive = false;
                self.cut_all(true, false);
            }
            Fault::KillDestination => {
                self.destination.alive = false;
                self.cut_all(false, true);
            }
            Fault::CutMain => self.cut_last(|channel| channel == Channel::Main),
            Fault::CutUrgent => self.cut_last(|channel| channel == Channel::Urgent),
            Fault::CutPages => self.cut_last(|channel| matches!(channel, Channel::Pages(_))),
            Fault::CutAll => {
                self.cut_last(|channel| channel == Channel::Main);
                self.cut_last(|channel| channel == Channel::Urgent);
                for index in 0..self.plan.page_channels {
                    self.cut_last(|channel| channel == Channel::Pages(index));
                }
            }
            Fault::FreezeSource => return self.source.alive && self.freeze(Side::Source),
            Fault::FreezeDestination => return self.destination.alive && self.freeze(Side::Destination),
            // Who is to do something must not be frozen.
            Fault::Cancel | Fault::StartPostcopy | Fault::PauseSource | Fault::GuestEnds if self.is_frozen(Side::Source) => return false,
            Fault::PauseDestination | Fault::GiveUpDestination if self.is_frozen(Side::Destination) => return false,
            Fault::Cancel => self.source_is_ended_by(source::Input::Cancel),
            Fault::GuestEnds => self.guest_ends(),
            Fault::StartPostcopy => self.source.engine.handle(source::Input::StartPostcopy, self.now),
            Fault::PauseSource if self.source.alive && self.source.engine.is_committed() && !self.source.engine.is_over() => {
                self.source.engine.handle(source::Input::Pause, self.now);
            }
            Fault::PauseDestination if self.destination.alive && self.destination.engine.status() == Status::PostcopyActive => {
                self.destination.engine.handle(destination::Input::Pause);
            }
            // Before the source is there it would be the end of the destination; without a link only a person who knows both sides may.
            Fault::GiveUpDestination
                if self.destination.alive && self.destination.session.is_some() && !self.destination.engine.is_paused() =>
            {
                self.destination.engine.handle(destination::Input::GiveUp("nobody wants it here".into()));
            }
            Fault::TimePasses => self.now += TOO_LONG,
            Fault::LoseFrame => return self.connections.iter_mut().any(|connection| connection.to_destination.lose_one()),
            // These wait for the moment at which they can happen.
            Fault::PauseSource | Fault::PauseDestination | Fault::GiveUpDestination | Fault::Lose(_) => return false,
            Fault::PrepareFails | Fault::LoadFails | Fault::StopFails | Fault::GiveUpFails | Fault::ResumeFails | Fault::FlushFails => {
                return false;
            }
        }
        true
    }

    /// Whether it is time for `fault`; it happens once.
    pub(super) fn fails(&mut self, fault: Fault) -> bool {
        let step = self.plan_step();
        let due = self.plan.faults.iter().position(|(at, planned)| *planned == fault && Some(*at) <= step);
        if let Some(due) = due {
            self.say(format!("{fault:?}"));
            self.plan.faults.remove(due);
        }
        due.is_some()
    }

    /// Cuts `connection` if it is time for a frame of this kind to be lost.
    pub(super) fn may_lose(&mut self, connection: usize, kind: Kind) {
        if self.fails(Fault::Lose(kind)) {
            self.cut(connection);
        }
    }

    /// Cuts both directions of a connection; some of what is under way may still arrive. Either side may know at once, or late.
    pub(super) fn cut(&mut self, connection: usize) {
        let cut = [(); 2].map(|()| {
            let keep = [0, 1, 4, usize::MAX][self.choices.below(4) as usize];
            let late = [0, 0, 100, 3000][self.choices.below(4) as usize];
            (keep, self.step + self.choices.below(late + 1))
        });
        let connection = &mut self.connections[connection];
        connection.to_destination.cut(cut[0].0, cut[0].1);
        connection.to_source.cut(cut[1].0, cut[1].1);
    }

    fn cut_last(&mut self, such: impl Fn(Channel) -> bool) {
        if let Some(last) = self.connections.iter().rposition(|connection| such(connection.channel)) {
            self.cut(last);
        }
    }

    /// Whoever dies leaves the other the end of all connections, which come at once where its kernel lives on.
    fn cut_all(&mut self, to_destination: bool, to_source: bool) {
        for index in 0..self.connections.len() {
            let (keep, noticed) = (self.choices.below(4) as usize, self.step + self.choices.below(100));
            let connection = &mut self.connections[index];
            if to_destination {
                connection.to_destination.cut(keep, noticed);
            }
            if to_source {
                connection.to_source.cut(keep, noticed);
            }
        }
    }

    /// The guest ends by itself, if it is at the source; its process hears of it, or stops it just now and sees it.
    fn guest_ends(&mut self) {
        let source = &mut self.source;
        if !source.alive || source.outcome.is_some() {
            return;
        }
        if source.right == Right::GivenUp {
            // Word of it comes late, from before the switch: it must mean nothing any more.
            return source.engine.handle(source::Input::GuestEnded("it powered off".into()), self.now);
        }
        source.guest_ended = true;
        if source.right == Right::Running {
            source.right = Right::Ended;
        }
        if !source.stopping || self.choices.chance(50) {
            self.source_is_ended_by(source::Input::GuestEnded("it powered off".into()));
        }
    }

    /// The source is told to end the migration, unless it is too late for that.
    pub(super) fn source_is_ended_by(&mut self, why: source::Input) {
        if !self.source.alive || self.source.engine.is_committed() {
            return;
        }
        self.source.engine.handle(why, self.now);
        // A blocked send is cut in the middle of a frame: nothing can follow it.
        if let Some(main) = self.source.main
            && self.choices.chance(30)
        {
            self.connections[main].to_destination.cut(usize::MAX, u64::MAX);
            self.source.main = None;
        }
    }
}
