//! Every state that can be reached from one, breadth first, and from which of them an aim can be reached.

use std::collections::HashMap;
use std::rc::Rc;

use crate::world::{State, Step, World};

/// More states than this mean that something counts without an end.
const MAX_STATES: usize = 5_000_000;

/// A state that breaks a property, and how it came to be.
#[derive(Debug)]
pub struct Violation {
    pub property: &'static str,
    pub story: Vec<Step>,
    pub state: State,
}

/// All states, and what leads from one to the other.
pub struct Graph {
    pub states: Vec<Rc<State>>,
    /// From where, and by what, each state was reached first.
    origins: Vec<Option<(u32, Step)>>,
    /// Pairs of states of which the second follows from the first in the usual course of things.
    usual: Vec<(u32, u32)>,
    pub transitions: usize,
}

impl Graph {
    /// Explores all that can come of `begin`; ends with the first state in which `broken` names a property.
    pub fn explore(world: &mut World, begin: State, broken: impl Fn(&State) -> Option<&'static str>) -> Result<Graph, Box<Violation>> {
        let begin = Rc::new(begin);
        let mut numbers = HashMap::from([(begin.clone(), 0)]);
        let mut graph = Graph { states: vec![begin], origins: vec![None], usual: Vec::new(), transitions: 0 };
        let mut next = 0;
        while let Some(state) = graph.states.get(next).cloned() {
            for (step, is_usual) in world.steps(&state) {
                let mut after = (*state).clone();
                world.take(&mut after, step);
                graph.transitions += 1;
                let number = match numbers.get(&after) {
                    Some(number) => *number,
                    None => {
                        let (after, number) = (Rc::new(after), graph.states.len() as u32);
                        numbers.insert(after.clone(), number);
                        graph.states.push(after.clone());
                        graph.origins.push(Some((next as u32, step)));
                        if let Some(property) = broken(&after) {
                            return Err(Box::new(graph.violation(property, number as usize)));
                        }
                        number
                    }
                };
                if is_usual {
                    graph.usual.push((next as u32, number));
                }
            }
            next += 1;
            if graph.states.len() >= MAX_STATES {
                return Err(Box::new(graph.violation("there is an end to the states", graph.states.len() - 1)));
            }
        }
        Ok(graph)
    }

    /// Which states lead, or may lead, in the usual course of things to one that is `aim`.
    pub fn lead_to(&self, aim: impl Fn(&State) -> bool) -> Vec<bool> {
        let mut before = vec![Vec::new(); self.states.len()];
        for (from, to) in &self.usual {
            before[*to as usize].push(*from);
        }
        let mut leads: Vec<bool> = self.states.iter().map(|state| aim(state)).collect();
        let mut open: Vec<usize> = (0..leads.len()).filter(|number| leads[*number]).collect();
        while let Some(number) = open.pop() {
            for from in std::mem::take(&mut before[number]) {
                if !std::mem::replace(&mut leads[from as usize], true) {
                    open.push(from as usize);
                }
            }
        }
        leads
    }

    /// Every state that is `such` must lead to one that is `aim`.
    pub fn require(
        &self,
        property: &'static str,
        such: impl Fn(&State) -> bool,
        aim: impl Fn(&State) -> bool,
    ) -> Result<(), Box<Violation>> {
        let leads = self.lead_to(aim);
        match (0..self.states.len()).find(|number| such(&self.states[*number]) && !leads[*number]) {
            Some(number) => Err(Box::new(self.violation(property, number))),
            None => Ok(()),
        }
    }

    fn violation(&self, property: &'static str, number: usize) -> Violation {
        let (mut story, mut at) = (Vec::new(), number);
        while let Some((before, step)) = self.origins[at] {
            story.push(step);
            at = before as usize;
        }
        story.reverse();
        Violation { property, story, state: (*self.states[number]).clone() }
    }
}
