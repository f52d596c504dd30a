//! When messages left, and when they were there for whoever waited for them: noted in a thread while it is asked for, and
//! nowhere else. The ends of a worker's links belong to its thread, so a thread's moments are a worker's.

use std::cell::RefCell;
use std::time::Instant;

use super::{Header, Kind};

/// What happened to a message at one of its ends.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// When.
    pub at: Instant,
    /// It left here; else it was here when it was wanted, for the first time.
    pub sent: bool,
    /// The message.
    pub header: Header,
}

/// A thread's moments: as many as there is room for, and how many more there were.
#[derive(Debug, Default)]
pub struct Moments {
    /// In the order of time.
    pub noted: Vec<Moment>,
    /// Those there was no room for.
    pub dropped: u64,
}

thread_local! {
    static MOMENTS: RefCell<Option<Moments>> = const { RefCell::new(None) };
}

/// Begins to note the calling thread's, up to `room` of them.
pub fn begin(room: usize) {
    let noted = Vec::with_capacity(room);
    MOMENTS.replace(Some(Moments { noted, dropped: 0 }));
}

/// Ends it: what was noted, if anything was to be.
pub fn end() -> Moments {
    MOMENTS.take().unwrap_or_default()
}

/// Notes a message, if that is asked for. Reports are for the console, which is not recorded.
pub(super) fn note(sent: bool, header: &Header) {
    MOMENTS.with_borrow_mut(|moments| {
        let Some(moments) = moments.as_mut().filter(|_| header.kind != Kind::Report) else { return };
        match moments.noted.len() < moments.noted.capacity() {
            true => moments.noted.push(Moment { at: Instant::now(), sent, header: *header }),
            false => moments.dropped += 1,
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_notes_as_many_as_it_has_room_for_while_it_is_asked_to() {
        let header = |kind| Header::new(kind, 3, 1, 2, [1; 4]);
        note(true, &header(Kind::Activation));
        begin(2);
        for kind in [Kind::Report, Kind::Activation, Kind::Labels, Kind::Cotangent] {
            note(kind == Kind::Labels, &header(kind));
        }
        // Another thread's are not this one's.
        std::thread::spawn(move || note(true, &header(Kind::Gradient))).join().unwrap();
        let Moments { noted, dropped } = end();
        let kinds: Vec<_> = noted.iter().map(|moment| (moment.header.kind, moment.sent)).collect();
        assert_eq!((kinds, dropped), (vec![(Kind::Activation, false), (Kind::Labels, true)], 1));
        note(true, &header(Kind::Activation));
        assert!(end().noted.is_empty());
    }
}
