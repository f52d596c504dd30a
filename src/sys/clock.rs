//! The clock that never goes back, as a number that other processes can read too.

use std::sync::OnceLock;
use std::time::Instant;

use nix::time::{ClockId, clock_gettime};

/// How often two readings of the clock are compared.
const ATTEMPTS: usize = 20;

/// Nanoseconds of the machine's monotonic clock at `instant`: on one machine the same for all processes, unless they are in time
/// namespaces of their own ([`clock_name`]); on another machine anything.
pub fn nanoseconds(instant: Instant) -> u64 {
    // `Instant` is read from that clock, but does not show it: one moment is read both ways.
    static BOTH: OnceLock<(Instant, u64)> = OnceLock::new();
    let &(known, at) = BOTH.get_or_init(|| {
        // The thread may have to wait between readings: the shortest of some counts.
        let both = || {
            let before = Instant::now();
            let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
                (time.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec() as u64)
            });
            let between = before.elapsed();
            (between, (before + between / 2, time))
        };
        std::iter::repeat_with(both)
            .take(ATTEMPTS)
            .min_by_key(|(between, _)| *between)
            .map_or((Instant::now(), 0), |(_, known)| known)
    });
    match instant.checked_duration_since(known) {
        Some(since) => at.saturating_add(since.as_nanos() as u64),
        None => at.saturating_sub(known.saturating_duration_since(instant).as_nanos() as u64),
    }
}

/// Two processes whose clocks have the same name read the same clock: the machine, as long as it runs, and the time namespace.
pub fn clock_name() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
    match boot.trim() {
        // Nothing is known of it: a clock of its own.
        "" => format!("process {} on {}", std::process::id(), super::host::hostname()),
        boot => format!("{boot} {}", namespace.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn differences_are_those_of_instants() {
        let now = Instant::now();
        let (here, there) = (nanoseconds(now), nanoseconds(now + Duration::from_micros(1500)));
        assert_eq!(there - here, 1_500_000);
        assert_eq!(here - nanoseconds(now - Duration::from_nanos(7)), 7);
        // What another process would read.
        let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
        let read = time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64;
        assert!(read.abs_diff(nanoseconds(Instant::now())) < 1_000_000_000);
        // Read between two moments, it lies between them but for what one reading takes.
        for _ in 0..1000 {
            let before = nanoseconds(Instant::now());
            let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
            let after = nanoseconds(Instant::now());
            let read = time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64;
            assert!(before <= read + 1_000 && read <= after + 1_000, "{before} {read} {after}");
        }
        assert_eq!(clock_name(), clock_name());
    }
}
