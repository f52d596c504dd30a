//! Signals that ask a training run to stop.

use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use crate::comm::Orders;
use crate::pipeline::orders::Requests;
use crate::{Error, Result};

/// A signal within this time of the first is the same request, delivered twice (to a job's step and by its script).
const ECHO: Duration = Duration::from_secs(1);

/// From now on, SIGTERM, SIGUSR1 or SIGINT asks the run to stop at the next batch with a checkpoint; another, a second or
/// more later, ends this process at once. Rank 0 (`chief`) says so; a job's ranks are often all signalled together.
///
/// # Errors
/// [`Error::Run`] if the operating system refuses the handlers or the thread that listens.
pub fn raise_on_signals(requests: &Requests, chief: bool) -> Result<()> {
    let refused = |e: std::io::Error| Error::Run(format!("listening for signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGUSR1, SIGINT]).map_err(refused)?;
    let requests = requests.clone();
    let body = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            let name = signal_name(signal).unwrap_or("a signal");
            match first {
                None => {
                    let level = if chief { log::Level::Info } else { log::Level::Debug };
                    log::log!(
                        level,
                        "{name}: stopping at the batch's end with a checkpoint; a second one stops at once"
                    );
                    requests.raise(Orders::STOP);
                    first = Some(Instant::now());
                }
                Some(at) if at.elapsed() < ECHO => {}
                Some(_) => {
                    log::error!("{name}: stopped at once, without a checkpoint");
                    // Without the libraries' destructors: the workers still use what those would free.
                    signal_hook::low_level::exit(128 + signal);
                }
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(body).map_err(refused)?;
    Ok(())
}
