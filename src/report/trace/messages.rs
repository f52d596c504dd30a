//! Messages of which both ends are recorded.

use std::collections::HashMap;

use crate::metrics::Recording;
use crate::metrics::recording::Message;

/// A message at both of its ends, which are known by their parts' places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried<'a> {
    pub from: usize,
    pub to: usize,
    pub sent: &'a Message,
    pub received: &'a Message,
}

/// What a message is known by at both of its ends; the number tells those apart that are alike.
type Key = (u32, u64, u32, u32, usize);

/// A worker's messages of one direction, each with its key.
fn keyed(messages: &[Message], sent: bool) -> impl Iterator<Item = (Key, &Message)> {
    let mut seen = HashMap::new();
    messages.iter().filter(move |message| message.sent == sent).map(move |message| {
        let alike = (message.link, message.batch, message.validation, message.step);
        let number = seen.entry(alike).and_modify(|n| *n += 1).or_insert(0usize);
        ((alike.0, alike.1, alike.2, alike.3, *number), message)
    })
}

/// All of these parts', by receiver.
pub(super) fn carried(parts: &[Recording]) -> Vec<Carried<'_>> {
    let mut sent = HashMap::new();
    for (from, part) in parts.iter().enumerate() {
        sent.extend(keyed(&part.messages, true).map(|(key, message)| (key, (from, message))));
    }
    let mut all = Vec::new();
    for (to, part) in parts.iter().enumerate() {
        let both = |(key, received)| {
            let &(from, sent) = sent.get(&key)?;
            Some(Carried { from, to, sent, received })
        };
        all.extend(keyed(&part.messages, false).filter_map(both));
    }
    all
}
