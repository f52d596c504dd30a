//! Events one after another, each in a TFRecord's frame: length, its checksum, the event, its checksum.

use std::io::Write;

use prost::Message;

use super::event::{Event, SessionLog, Summary, Value, What};

/// What the first event of a file says. From version 2 on, [`SessionLog::START`] is heeded.
const VERSION: &str = "brain.Event:2";

/// Writes events.
pub struct Records<W> {
    out: W,
}

impl<W: Write> Records<W> {
    /// Begins the file of a run that goes on where `done` batches are done, at `seconds` since 1970: what other files of the same
    /// folder, earlier by name, have of later steps does not count any more.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn begin(out: W, seconds: f64, done: u64) -> std::io::Result<Self> {
        let mut records = Records { out };
        let what = Some(What::FileVersion(VERSION.into()));
        records.write(&Event { wall_time: seconds, step: 0, what })?;
        let what = Some(What::SessionLog(SessionLog { status: SessionLog::START }));
        records.write(&Event { wall_time: seconds, step: done as i64 + 1, what })?;
        Ok(records)
    }

    /// Adds what was measured when `step` batches were done, at `seconds` since 1970.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn add(&mut self, seconds: f64, step: u64, value: Vec<Value>) -> std::io::Result<()> {
        let what = Some(What::Summary(Summary { value }));
        self.write(&Event { wall_time: seconds, step: step as i64, what })
    }

    /// The writer.
    pub fn into_inner(self) -> W {
        self.out
    }

    /// One record, handed over at once: a reader that is at work meanwhile sees it whole, or not.
    fn write(&mut self, event: &Event) -> std::io::Result<()> {
        self.out.write_all(&framed(&event.encode_to_vec()))
    }
}

/// `bytes` as a TFRecord.
fn framed(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), bytes, &masked(bytes)].concat()
}

/// The CRC-32C (Castagnoli) of `bytes`, rotated and shifted: checksums of what holds checksums would be weak.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the `RecordWriter` of the Python package `tensorboard` 2.21.0 writes the same two events.
    #[test]
    fn records_are_tensorboards_to_the_byte() {
        let mut records = Records { out: Vec::new() };
        records.add(1.5, 7, vec![Value::scalar("train/loss", 0.0)]).unwrap();
        let what = Some(What::SessionLog(SessionLog { status: SessionLog::START }));
        records.write(&Event { wall_time: 0.0, step: 1, what }).unwrap();
        let hex: String = records.into_inner().iter().map(|byte| format!("{byte:02x}")).collect();
        let scalar = "200000000000000029eda95009000000000000f83f10072a130a110a0a747261696e2f6c6f73731500000000844b8711";
        let start = "06000000000000007369d53710013a02080163db824b";
        assert_eq!(hex, [scalar, start].concat());
    }
}
