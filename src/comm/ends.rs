//! The two ends of a link, whatever carries its messages.

use super::exchange::Places;
use super::link::Link;
use super::{Header, Orders, local, moments, mpi};
use crate::Result;
use crate::backend::slots::{Done, Slot, SlotMut};

/// The sending end of a link, owned by its worker's thread.
pub struct Sender {
    end: SenderEnd,
    /// Where the values go, if not into the link's own buffers.
    pub(super) places: Option<Places>,
    /// A message whose values are being written.
    writing: Option<(Header, Done)>,
}

pub(super) enum SenderEnd {
    /// To a worker of the same process.
    Local(local::Sender),
    /// To a worker of another rank.
    Mpi(mpi::Sender),
    /// To a worker of another rank of this node, through memory that both see.
    Shared(mpi::SharedSender),
}

/// Calls the same method on whichever variant there is.
macro_rules! each {
    ($end:expr, $kind:ident, $x:ident => $body:expr) => {
        match $end {
            $kind::Local($x) => $body,
            $kind::Mpi($x) => $body,
            $kind::Shared($x) => $body,
        }
    };
}

impl Sender {
    pub(super) fn new(end: SenderEnd) -> Self {
        Sender { end, places: None, writing: None }
    }

    fn link(&self) -> &Link {
        each!(&self.end, SenderEnd, end => end.link())
    }

    /// Where the next message's values go. Its contents are whatever was there before; called again before
    /// [`Sender::start_when`] it is the same one.
    ///
    /// Waits if the message before it is not off, or every buffer is still in flight.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when the receiver ended, the links were stopped, or the timeout passed.
    pub fn slot(&mut self) -> Result<SlotMut<'_>> {
        while !self.progress()? {
            std::thread::yield_now();
        }
        let words = each!(&mut self.end, SenderEnd, end => end.slot())?;
        match &mut self.places {
            // Once there is a buffer, the place that is next is free too: see `LinkSpec::in_flight`.
            Some(places) => places.wait().map(SlotMut::Device),
            None => Ok(SlotMut::Host(words)),
        }
    }

    /// Starts the message in the slot when its values are `done`: at once, or in a later [`Sender::progress`].
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when the header is not one for this link, else as [`Sender::slot`].
    pub fn start_when(&mut self, header: &Header, done: Done) -> Result<()> {
        self.start_part_when(&header.carrying(self.link().spec.words as u32), done)
    }

    /// As [`Sender::start_when`], where messages need not fill the link: `header.words` are sent.
    ///
    /// # Errors
    /// As there.
    pub fn start_part_when(&mut self, header: &Header, done: Done) -> Result<()> {
        let words = if self.places.is_some() { 0 } else { header.words };
        self.writing = Some((header.carrying(words), done));
        self.progress().map(|_| ())
    }

    /// Starts the message whose values have been written meanwhile; whether none is left that is not off.
    ///
    /// # Errors
    /// As [`Sender::start_when`].
    pub fn progress(&mut self) -> Result<bool> {
        let Some((header, done)) = &self.writing else { return Ok(true) };
        if !done.is_done()? {
            return Ok(false);
        }
        let header = *header;
        self.writing = None;
        if let Some(places) = &mut self.places {
            places.start()?;
        }
        self.start(&header)?;
        Ok(true)
    }

    /// The next message's payload in host memory at the link's full capacity, to be filled in place.
    ///
    /// # Errors
    /// As [`Sender::slot`].
    pub fn host_slot(&mut self) -> Result<&mut [f32]> {
        each!(&mut self.end, SenderEnd, end => end.slot())
    }

    /// Is there a buffer for [`Sender::slot`] without waiting?
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when the links were stopped.
    pub fn ready(&self) -> Result<bool> {
        each!(&self.end, SenderEnd, end => end.ready())
    }

    /// Starts the message that [`Sender::host_slot`] holds, its first `header.words` words, and returns at once.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when the header is not one for this link, else as [`Sender::slot`].
    pub fn start(&mut self, header: &Header) -> Result<()> {
        // Before: it must not be there earlier than it left.
        moments::note(true, header);
        each!(&mut self.end, SenderEnd, end => end.start(header))
    }

    /// Copies `payload` into the next buffer and starts it: [`Sender::host_slot`] and [`Sender::start`] in one.
    ///
    /// # Errors
    /// As those two, and when `payload` is not `header.words` long.
    pub fn send(&mut self, header: &Header, payload: &[f32]) -> Result<()> {
        let link = self.link();
        link.check_outgoing(header)?;
        if payload.len() != header.words as usize {
            return Err(link.error(link.from_rank, format!("{header} was given {} words", payload.len())));
        }
        self.host_slot()?[..payload.len()].copy_from_slice(payload);
        self.start(header)
    }

    /// Whether messages leave from host memory.
    pub fn is_in_host_memory(&self) -> bool {
        self.places.is_none()
    }

    /// Waits until all started messages have left: their buffers could be freed.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] as in [`Sender::slot`].
    pub fn flush(&mut self) -> Result<()> {
        if let Some(places) = &mut self.places {
            places.flush()?;
        }
        each!(&mut self.end, SenderEnd, end => end.flush())
    }
}

/// The receiving end of a link, owned by its worker's thread.
pub struct Receiver {
    end: ReceiverEnd,
    /// Where the values come, if not in the link's own buffers.
    pub(super) places: Option<Places>,
    /// A message whose values are being read.
    reading: Option<Done>,
    /// That the oldest message came has been noted.
    noted: bool,
}

pub(super) enum ReceiverEnd {
    /// From a worker of the same process.
    Local(local::Receiver),
    /// From a worker of another rank.
    Mpi(mpi::Receiver),
    /// From a worker of another rank of this node, likewise.
    Shared(mpi::SharedReceiver),
}

impl Receiver {
    pub(super) fn new(end: ReceiverEnd) -> Self {
        Receiver { end, places: None, reading: None, noted: false }
    }

    fn link(&self) -> &Link {
        each!(&self.end, ReceiverEnd, end => end.link())
    }

    /// Waits for the next message, which must be the `expected` one but for its length: its orders, and its values.
    ///
    /// # Errors
    /// As [`Receiver::wait`].
    pub fn wait_slot(&mut self, expected: &Header) -> Result<(Orders, Slot<'_>)> {
        let expected = expected.carrying(self.link().spec.words as u32);
        let orders = self.hold_next(&expected)?.orders;
        let slot = match &mut self.places {
            Some(places) => Slot::Device(places.wait()?),
            None => Slot::Host(each!(&mut self.end, ReceiverEnd, end => end.hold(Some(&expected)))?.1),
        };
        Ok((orders, slot))
    }

    /// As [`Receiver::wait_slot`], where messages need not fill the link: `expected.words` are due, and begin what is given. That is the
    /// buffer as a whole: a GPU copies from it, and locks it once.
    ///
    /// # Errors
    /// As [`Receiver::wait`].
    pub fn wait_part(&mut self, expected: &Header) -> Result<Slot<'_>> {
        self.hold_next(expected)?;
        match &mut self.places {
            Some(places) => places.wait().map(Slot::Device),
            None => Ok(Slot::Host(each!(&mut self.end, ReceiverEnd, end => end.whole()))),
        }
    }

    /// Waits until the message before is given back, and for the next one, which must be `expected`.
    fn hold_next(&mut self, expected: &Header) -> Result<Header> {
        while !self.progress()? {
            std::thread::yield_now();
        }
        let words = if self.places.is_some() { 0 } else { expected.words };
        self.hold(&expected.carrying(words))
    }

    /// Gives the message back when its values are `done` being read: at once, or in a later [`Receiver::progress`].
    ///
    /// # Errors
    /// As [`Receiver::release`].
    pub fn release_when(&mut self, done: Done) -> Result<()> {
        self.reading = Some(done);
        self.progress().map(|_| ())
    }

    /// Gives the message back whose values have been read meanwhile; whether none is left.
    ///
    /// # Errors
    /// As [`Receiver::release`].
    pub fn progress(&mut self) -> Result<bool> {
        let Some(done) = &self.reading else { return Ok(true) };
        if !done.is_done()? {
            return Ok(false);
        }
        self.reading = None;
        if let Some(places) = &mut self.places {
            places.start()?;
        }
        self.release()?;
        Ok(true)
    }

    /// Waits for the oldest unreleased message and returns its payload, in place.
    ///
    /// Until [`Receiver::release`] the same message is returned again, checked against `expected` each time.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when kind, link, batch, step, shape or length are not those of `expected` (both are
    /// shown), the sender ended, the links were stopped, or the timeout passed.
    pub fn wait(&mut self, expected: &Header) -> Result<&[f32]> {
        self.wait_with_orders(expected).map(|(_, payload)| payload)
    }

    /// As [`Receiver::wait`], with the orders of the message's header in front of its payload.
    ///
    /// # Errors
    /// As [`Receiver::wait`].
    pub fn wait_with_orders(&mut self, expected: &Header) -> Result<(Orders, &[f32])> {
        // In two steps: the borrow of the payload must not keep the link from being named.
        let header = self.hold(expected)?;
        Ok((header.orders, each!(&mut self.end, ReceiverEnd, end => end.hold(Some(expected)))?.1))
    }

    /// Waits for the oldest unreleased message, which must be `expected`.
    fn hold(&mut self, expected: &Header) -> Result<Header> {
        let header = each!(&mut self.end, ReceiverEnd, end => end.hold(Some(expected)))?.0;
        self.link().verify(&header, expected)?;
        if !std::mem::replace(&mut self.noted, true) {
            moments::note(false, &header);
        }
        Ok(header)
    }

    /// Waits for the oldest unreleased message whatever its batch and step: for messages that say themselves
    /// what they are, such as reports.
    ///
    /// # Errors
    /// As [`Receiver::wait`], but only kind and link are verified.
    pub fn wait_any(&mut self) -> Result<(Header, &[f32])> {
        let got = each!(&mut self.end, ReceiverEnd, end => end.hold(None))?.0;
        let link = self.link();
        link.verify(&got, &Header { kind: link.spec.kind, link: link.spec.id, ..got })?;
        each!(&mut self.end, ReceiverEnd, end => end.hold(None))
    }

    /// Whether messages come in host memory.
    pub fn is_in_host_memory(&self) -> bool {
        self.places.is_none()
    }

    /// Has the oldest unreleased message arrived?
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when the links were stopped.
    pub fn ready(&self) -> Result<bool> {
        each!(&self.end, ReceiverEnd, end => end.ready())
    }

    /// Gives the held message's buffer back, so that one more message can come in.
    ///
    /// # Errors
    /// [`crate::Error::Transport`] when no message is held: [`Receiver::wait`] comes first.
    pub fn release(&mut self) -> Result<()> {
        self.noted = false;
        each!(&mut self.end, ReceiverEnd, end => end.release())
    }
}
