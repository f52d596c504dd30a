//! One line that lives on a terminal while something goes on; plain lines now and then elsewhere.
//!
//! It is drawn with carriage returns and blanks: it needs no terminal that understands escape sequences, and writes none.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, TermLike};

use super::logging;

/// Plain lines come this often.
const EVERY: Duration = Duration::from_secs(10);
/// The line is drawn so many times a second at most.
const HERTZ: u8 = 10;

/// One line that lives while something goes on, and is gone afterwards.
pub(super) struct Live {
    bar: Option<ProgressBar>,
    /// Whether there are plain lines in its place.
    plain: bool,
    begun: Instant,
    last: Instant,
}

impl Live {
    /// Of `length` steps, shown by `template`, indicatif's; not at all unless `shown`, nor where nothing but results is asked for.
    pub fn new(length: u64, template: &str, shown: bool) -> Self {
        let (shown, terminal) = (shown && !logging::is_quiet(), Term::stderr().is_term());
        let bar = (shown && terminal).then(|| {
            let target = ProgressDrawTarget::term_like_with_hz(Box::new(OneLine::default()), HERTZ);
            let bar = ProgressBar::with_draw_target(Some(length), target);
            // Templates are constants; an unusable one would only lose the look.
            match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style.progress_chars("=> ").with_key("rate", rate)),
                Err(_) => bar,
            }
        });
        logging::around(bar.clone());
        let now = Instant::now();
        Live { bar, plain: shown && !terminal, begun: now, last: now }
    }

    /// Something countable: `videos`, `bytes`.
    pub fn counting(length: u64, unit: &str) -> Self {
        let template = match unit {
            "bytes" => "[{bar:24}] {bytes}/{total_bytes} ({bytes_per_sec}, ETA {eta})".into(),
            unit => format!("[{{bar:24}}] {{pos}}/{{len}} {unit} ({{rate}}/s, ETA {{eta}})"),
        };
        Live::new(length, &template, true)
    }

    /// `done` steps of `length` are.
    pub fn at(&self, done: u64, length: u64) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(length) {
                bar.set_length(length);
            }
            bar.set_position(done);
        }
    }

    /// `n` more steps are done.
    pub fn add(&self, n: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(n);
        }
    }

    /// `done` steps of `length` are, of which `text` tells; every now and then, and at the end, `line` is what the log gets.
    pub fn tell(
        &mut self,
        [done, length]: [u64; 2],
        text: impl FnOnce() -> String,
        line: impl FnOnce() -> String,
    ) -> bool {
        self.at(done, length);
        if let Some(bar) = &self.bar {
            bar.set_message(text());
        }
        let due = self.last.elapsed() >= EVERY || done == length;
        if due {
            match (&self.bar, self.plain) {
                (None, true) => log::info!("{}", line()),
                _ => logging::to_file(&line()),
            }
            self.last = Instant::now();
        }
        due
    }

    /// Since it began.
    pub fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64().max(1e-9)
    }
}

/// Steps a second, `{rate}` in templates: indicatif's own has as many digits as there are.
fn rate(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    // Text grows without failing.
    let _ = write!(out, "{:.1}", state.per_sec());
}

impl Drop for Live {
    fn drop(&mut self) {
        logging::around(None);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The last line of the terminal that standard error is.
#[derive(Debug, Default)]
struct OneLine {
    /// Written when it is complete.
    pending: Mutex<String>,
}

impl OneLine {
    fn add(&self, text: &str) -> std::io::Result<()> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }
}

impl TermLike for OneLine {
    /// The last column stays free: a terminal may go on to the next line behind it.
    fn width(&self) -> u16 {
        let columns = Term::stderr().size_checked().map(|(_, columns)| columns);
        columns.filter(|&columns| columns > 0).unwrap_or(80) - 1
    }

    fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }

    fn write_line(&self, text: &str) -> std::io::Result<()> {
        self.add(text)
    }

    fn write_str(&self, text: &str) -> std::io::Result<()> {
        self.add(text)
    }

    fn clear_line(&self) -> std::io::Result<()> {
        self.add(&format!("\r{}\r", " ".repeat(self.width().into())))
    }

    fn flush(&self) -> std::io::Result<()> {
        let text = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        std::io::stderr().write_all(text.as_bytes())
    }
}

/// So many seconds as people say it, in two units at most.
pub(super) fn lasting(seconds: f64) -> String {
    // What never ends lasts for years; casts saturate.
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_said_in_two_units() {
        let said = [0.4, 59.4, 59.6, 3661.0, 90_000.0].map(lasting);
        assert_eq!(said, ["0 s", "59 s", "1 min 00 s", "1 h 01 min", "1 d 01 h"]);
        assert!(lasting(f64::INFINITY).contains(" d ") && lasting(f64::NAN) == "0 s");
    }
}
