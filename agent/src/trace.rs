//! What calls have spent their time on, for callers that trace: those whose metadata has a `traceparent` (W3C Trace
//! Context), while `agent.trace` is on the kernel command line. The caller fetches it (`kata.agent.v1.Trace`).

use crate::prelude::*;
use crate::proto::agentext::{GuestPhase, GuestSpan};
use crate::server::calls::CallId;
use crate::sys;

/// The most calls that are recorded at a time, and the most that are kept until they are fetched.
const MOST: usize = 256;
const MOST_PHASES: usize = 16;

struct Open {
    span: GuestSpan,
    began: u64,
    /// When the last phase ended.
    marked: u64,
}

#[derive(Default)]
pub struct Trace {
    pub on: bool,
    open: BTreeMap<CallId, Open>,
    done: Vec<GuestSpan>,
}

impl Trace {
    /// A call has arrived, with this `traceparent`.
    pub fn begin(&mut self, call: CallId, traceparent: &str, method: &str) {
        if !self.on || self.open.len() >= MOST {
            return;
        }
        let Some(parent) = span_id(traceparent) else { return };
        let span = GuestSpan { parent, name: method.to_string(), ..Default::default() };
        let began = sys::monotonic_ns();
        self.open.insert(call, Open { span, began, marked: began });
    }

    pub fn is_recorded(&self, call: CallId) -> bool {
        self.open.contains_key(&call)
    }

    /// What the call has done since the last mark, or since its arrival, was this; `at` is CLOCK_MONOTONIC.
    pub fn mark(&mut self, call: CallId, name: &str, at: u64) {
        let Some(open) = self.open.get_mut(&call).filter(|open| open.span.phases.len() < MOST_PHASES) else { return };
        let at = at.max(open.marked);
        open.span.phases.push(GuestPhase {
            name: name.to_string(),
            start_ns: open.marked - open.began,
            duration_ns: at - open.marked,
        });
        open.marked = at;
    }

    /// The call has been answered.
    pub fn end(&mut self, call: CallId) {
        let Some(mut open) = self.open.remove(&call) else { return };
        open.span.duration_ns = sys::monotonic_ns().saturating_sub(open.began);
        if self.done.len() >= MOST {
            self.done.remove(0);
        }
        self.done.push(open.span);
    }

    /// Forgets the calls that wait no longer: their connection has ended.
    pub fn keep(&mut self, waits: impl Fn(CallId) -> bool) {
        self.open.retain(|call, _| waits(*call));
    }

    pub fn take(&mut self) -> Vec<GuestSpan> {
        core::mem::take(&mut self.done)
    }
}

/// The caller's span in a `traceparent`: its third part, 16 hexadecimal digits.
fn span_id(traceparent: &str) -> Option<Vec<u8>> {
    let digits = traceparent.split('-').nth(2).filter(|part| part.len() == 16 && part.is_ascii())?;
    (0..16).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_call_is_recorded_with_its_phases() {
        let mut trace = Trace { on: true, ..Default::default() };
        let before = sys::monotonic_ns();
        trace.begin(7, PARENT, "CreateContainer");
        assert!(trace.is_recorded(7) && !trace.is_recorded(8));
        let at = sys::monotonic_ns();
        trace.mark(7, "storages", at);
        trace.mark(7, "back in time", 1);
        trace.mark(8, "nobody's", at);
        trace.end(7);
        trace.end(7);
        let [span] = &trace.take()[..] else { panic!() };
        assert_eq!(span.parent, [0, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
        assert_eq!(span.phases.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["storages", "back in time"]);
        assert_eq!(span.phases[1].duration_ns, 0);
        assert!(span.phases[0].duration_ns <= at - before && span.duration_ns >= span.phases[0].duration_ns);
        assert!(trace.take().is_empty());
    }

    #[test]
    fn it_is_bounded_and_only_for_contexts() {
        let mut trace = Trace::default();
        trace.begin(1, PARENT, "Off");
        assert!(!trace.is_recorded(1));
        trace.on = true;
        for wrong in ["", "00-1-2-3", "00-4b-00f067aa0ba902b-01", "00-4b-00f067aa0ba902bx-01", "00-4b-äääääääää-01"]
        {
            trace.begin(1, wrong, "Wrong");
            assert!(!trace.is_recorded(1), "{wrong}");
        }
        for call in 0..1000 {
            trace.begin(call, PARENT, "Open");
        }
        assert_eq!(trace.open.len(), MOST);
        for _ in 0..100 {
            trace.mark(0, "phase", 0);
        }
        assert_eq!(trace.open[&0].span.phases.len(), MOST_PHASES);
        trace.keep(|call| call == 0);
        assert_eq!(trace.open.len(), 1);
        for call in 0..1000 {
            trace.begin(call, PARENT, "Done");
            trace.end(call);
        }
        assert_eq!(trace.take().len(), MOST);
    }
}
