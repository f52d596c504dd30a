//! What `ffmpeg` says on its error channel with `-loglevel level+info`: what streams a file has, and what went wrong.

use std::io::Read;
use std::path::Path;

/// No more than this is kept.
const MOST: u64 = 64 << 10;

/// The beginning of what it said.
#[derive(Clone, Debug, Default)]
pub(super) struct Messages(String);

/// A stream of pictures that is no cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stream {
    /// Its number in the file.
    pub number: usize,
    /// Whether the file says that it is the one to show.
    pub default: bool,
}

impl Messages {
    /// Reads the channel to its end, lest the child waits.
    pub(super) fn of(mut stderr: impl Read) -> Self {
        let mut kept = Vec::new();
        // A failed read ends the text; the exit status still tells.
        let _ = stderr.by_ref().take(MOST).read_to_end(&mut kept);
        let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        Messages(String::from_utf8_lossy(&kept).into_owned())
    }

    /// The video streams of the input, in order.
    pub(super) fn streams(&self) -> Vec<Stream> {
        let input = self.0.lines().skip_while(|line| !line.contains("Input #0"));
        let input = input.take_while(|line| !line.contains("Stream mapping") && !line.contains("Output #0"));
        input.filter_map(stream).collect()
    }

    /// The last line of the errors, with the one before it where the last is the usual summary about the file; without the
    /// file's name and what changes from run to run.
    pub(super) fn reason(&self, path: &Path) -> Option<String> {
        let name = format!("file:{}: ", path.display());
        let mut lines = self.0.lines().filter_map(error).rev();
        let last = lines.next()?;
        // It goes on with advice on options of its own.
        if self.0.contains("matches no streams") {
            return Some("no stream of pictures in it (sound alone, a cover, or a damaged header)".into());
        }
        let Some(summary) = last.strip_prefix(&name) else { return Some(last.into()) };
        match lines.next().map(|line| line.strip_prefix(&name).unwrap_or(line)) {
            Some(line) => Some(format!("{line} ({summary})")),
            None => Some(summary.into()),
        }
    }
}

/// `[info]   Stream #0:1[0x2](und): Video: h264 …, 25 fps (default)`
fn stream(line: &str) -> Option<Stream> {
    let (_, rest) = line.split_once("Stream #0:")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    let covers = ["(attached pic)", "(timed thumbnails)", "(still image)"];
    if !rest.contains(": Video: ") || covers.iter().any(|cover| rest.contains(cover)) {
        return None;
    }
    Some(Stream { number: rest[..digits].parse().ok()?, default: rest.contains("(default)") })
}

/// The text of a line that tells of an error: `[mov @ 0x55d0] [error] text`, or one without a level, which something else wrote.
fn error(line: &str) -> Option<&str> {
    let line = line.trim();
    let rest = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((source, text)) if source.contains(" @ 0x") => text,
        _ => line,
    };
    let text = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some(("error" | "fatal" | "panic", text)) => text.trim(),
        Some(("quiet" | "warning" | "info" | "verbose" | "debug" | "trace", _)) => return None,
        _ => rest,
    };
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_and_reasons_are_read() {
        let text = "[info] Input #0, mov,mp4, from 'file:a.mp4':\n\
            [info]   Stream #0:0[0x1]: Video: png, rgb24, 64x48 (attached pic)\n\
            [info]   Stream #0:1[0x2](und): Video: h264 (High), yuv420p, 64x48, 25 fps\n\
            [info]   Stream #0:2[0x3](und): Audio: aac (default)\n\
            [info]   Stream #0:3[0x4](und): Video: h264 (High), yuv420p, 64x48, 25 fps (default)\n\
            [info] Stream mapping:\n[info]   Stream #0:1 -> #0:0 (h264 (native) -> rawvideo (native))\n\
            [info] Output #0, rawvideo, to 'pipe:1':\n[info]   Stream #0:0(und): Video: rawvideo, rgb24 (default)\n";
        let messages = Messages(text.into());
        assert_eq!(messages.streams(), [Stream { number: 1, default: false }, Stream { number: 3, default: true }]);
        assert_eq!(messages.reason(Path::new("a.mp4")), None);
        let reason = |text: &str| Messages(text.into()).reason(Path::new("a.mp4")).unwrap();
        let broken = "[mov @ 0x55] [error] moov atom not found\n[error] file:a.mp4: Invalid data found\n";
        assert_eq!(reason(broken), "moov atom not found (Invalid data found)");
        assert_eq!(reason("[warning] odd\n[h264 @ 0x1] [error] cut short\n[info] done\n"), "cut short");
        assert_eq!(reason("no codec\n"), "no codec");
        let sound =
            "[fatal] Stream map '0:V:0' matches no streams.\n[fatal] To ignore this, add a trailing '?' to the map.\n";
        assert!(reason(sound).starts_with("no stream of pictures"));
    }
}
