//! One run of a point: its ranks, started by `srun` or `mpirun`, watched, and judged by how they end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::folder::State;
use super::forecast::share;
use super::plan::Point;
use super::table::Measured;
use crate::{Error, Result};

/// What starts ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `srun`, inside a Slurm job.
    Srun,
    /// `mpirun`, on this machine alone.
    Mpirun,
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// With a result.
    Done(Box<Measured>),
    /// Without.
    Failed(State, String),
    /// It was ended, by the study or by others with SIGTERM: the study is to stop.
    Stopped,
}

/// One attempt at a run.
struct Attempt {
    /// How it ended, with its standard output; `None` where it was ended.
    ended: Option<(ExitStatus, String)>,
    /// What it wrote into the log.
    said: String,
}

/// How long ranks that were told to end may take for it.
const GRACE: Duration = Duration::from_secs(10);
/// Ranks that die of a signal this soon are started again: see `slurm/ranks.sh`.
const CRASHED_AT_START: Duration = Duration::from_secs(10);
const ATTEMPTS: usize = 3;
const SIGTERM: i32 = Signal::SIGTERM as i32;

impl Launcher {
    /// The command that starts `point`'s ranks of this program with these arguments.
    ///
    /// # Errors
    /// [`Error::Io`] if this program's file cannot be found.
    pub fn command(self, point: &Point, arguments: &[&str]) -> Result<Command> {
        let program = std::env::current_exe().map_err(|e| Error::io("/proc/self/exe", e))?;
        let words = |name: &str| -> Vec<String> {
            std::env::var(name).unwrap_or_default().split_whitespace().map(String::from).collect()
        };
        let mut command = match self {
            Launcher::Srun => {
                let mpi = std::env::var("MPI").ok().filter(|mpi| !mpi.is_empty()).unwrap_or_else(|| "pmix".into());
                let mut command = Command::new("srun");
                command.args([
                    format!("--mpi={mpi}"),
                    "--kill-on-bad-exit=1".into(),
                    "--distribution=block:block".into(),
                ]);
                command.args([format!("--nodes={}", point.nodes), format!("--ntasks={}", point.ranks)]);
                command.arg(format!("--ntasks-per-node={}", point.ranks.div_ceil(point.nodes)));
                command.args(words("SRUN_OPTIONS"));
                command
            }
            Launcher::Mpirun => {
                let mut command = Command::new("mpirun");
                let own = words("MPIRUN_OPTIONS");
                let placed = own.iter().any(|word| word.contains("bind-to") || word.contains("map-by"));
                // Other MPI libraries have no such limit, and do not know these.
                if open_mpi() {
                    command.args(["--oversubscribe", "--use-hwthread-cpus"]);
                    match share(point.ranks) {
                        _ if placed => &mut command,
                        // As on nodes of their own.
                        Some(share) => command.args(["--map-by", &format!("slot:PE={share}"), "--bind-to", "hwthread"]),
                        None => command.args(["--bind-to", "none"]),
                    };
                }
                command.args(own);
                command.arg("-n").arg(point.ranks.to_string());
                command
            }
        };
        command.arg(program).args(arguments);
        Ok(command)
    }

    /// Runs `point` once, no longer than `limit`; what its ranks say goes to the end of `log`. Ends them early when `stop` is raised.
    ///
    /// # Errors
    /// [`Error::Io`] if the launcher does not start or the disk refuses.
    pub fn run(self, point: &Point, arguments: &[&str], limit: Duration, log: &Path, stop: &AtomicBool) -> Result<End> {
        let mut attempt = 1;
        loop {
            let begun = Instant::now();
            let Attempt { ended, said } = self.once(point, arguments, limit, log, stop)?;
            let Some((status, output)) = ended else {
                return Ok(match stop.load(Ordering::Relaxed) {
                    true => End::Stopped,
                    false => {
                        End::Failed(State::OutOfTime, format!("longer than {:.0} s (--limit)", limit.as_secs_f64()))
                    }
                });
            };
            let failed = match (status.success(), output.lines().rev().find_map(|l| serde_json::from_str(l).ok())) {
                (true, Some(measured)) => return Ok(End::Done(Box::new(measured))),
                (true, None) => (State::Failed, "the ranks ended without a result".to_string()),
                (false, _) => judge(status, &said),
            };
            // Who ends a job's ranks may tell the study a little later.
            let asked_to_end = status.signal() == Some(SIGTERM) || status.code() == Some(128 + SIGTERM);
            if stop.load(Ordering::Relaxed) || asked_to_end {
                return Ok(End::Stopped);
            }
            let by_signal = status.signal().is_some() || status.code().is_some_and(|code| code > 128);
            let again =
                failed.0 == State::Failed && by_signal && begun.elapsed() < CRASHED_AT_START && attempt < ATTEMPTS;
            if !again {
                return Ok(End::Failed(failed.0, failed.1));
            }
            attempt += 1;
            log::warn!("{}: ranks died of a signal as they started; attempt {attempt} of {ATTEMPTS}", point.name);
        }
    }

    /// One attempt.
    fn once(
        self,
        point: &Point,
        arguments: &[&str],
        limit: Duration,
        log: &Path,
        stop: &AtomicBool,
    ) -> Result<Attempt> {
        let at_log = |e| Error::io(log, e);
        let mut file = File::options().create(true).append(true).read(true).open(log).map_err(at_log)?;
        let mut command = self.command(point, arguments)?;
        let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        writeln!(file, "== {}", words.join(" ")).map_err(at_log)?;
        let from = file.seek(SeekFrom::End(0)).map_err(at_log)?;
        let mut output = tempfile::tempfile().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        let launcher = command.get_program().to_os_string();
        command.stdin(Stdio::null());
        command.stdout(output.try_clone().map_err(at_log)?).stderr(file.try_clone().map_err(at_log)?);
        // A group of its own: a terminal's Ctrl-C reaches the study alone, which then ends the ranks.
        command.process_group(0);
        // SAFETY: between fork and exec, one system call that touches no memory of this process.
        unsafe {
            // A study that is killed outright takes its run along.
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGTERM)?));
        }
        let mut child = command.spawn().map_err(|e| Error::io(&launcher, e))?;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().map_err(at_log)? {
                break Some(status);
            }
            if begun.elapsed() > limit || stop.load(Ordering::Relaxed) {
                end(&mut child).map_err(at_log)?;
                break None;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let mut said = Vec::new();
        file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_end(&mut said)).map_err(at_log)?;
        let mut text = Vec::new();
        output.seek(SeekFrom::Start(0)).and_then(|_| output.read_to_end(&mut text)).map_err(at_log)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let ended = status.map(|status| (status, text));
        Ok(Attempt { ended, said: String::from_utf8_lossy(&said).into_owned() })
    }
}

/// Ends a launcher and with it its ranks: asks, then forces.
fn end(child: &mut Child) -> std::io::Result<()> {
    let pid = Pid::from_raw(child.id() as i32);
    // It may have ended by itself meanwhile.
    let _ = kill(pid, Signal::SIGTERM);
    let begun = Instant::now();
    while begun.elapsed() < GRACE {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill()?;
    child.wait().map(|_| ())
}

/// Whether `mpirun` is Open MPI's.
fn open_mpi() -> bool {
    static ASKED: OnceLock<bool> = OnceLock::new();
    *ASKED.get_or_init(|| {
        let version = Command::new("mpirun").arg("--version").stdin(Stdio::null()).output();
        version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("Open MPI"))
    })
}

/// What tells that memory was short: the program's own, CUDA's, MPI's, the kernel's and Slurm's words for it.
const SHORT_OF_MEMORY: [&str; 7] = [
    "memory allocation of",
    "cannot allocate memory",
    "out of memory",
    "out_of_memory",
    "oom-kill",
    "oom_kill",
    "not enough memory",
];

/// What a run that failed failed of, by how it ended and what it said.
fn judge(status: ExitStatus, said: &str) -> (State, String) {
    let cause = |words: &[&str]| {
        let has = |line: &&str| words.iter().any(|word| line.to_lowercase().contains(word));
        said.lines().find(has).map(|line| line.trim().chars().take(300).collect::<String>())
    };
    if let Some(line) = cause(&SHORT_OF_MEMORY) {
        return (State::OutOfMemory, line);
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        _ => "no exit code".into(),
    };
    let killed = status.signal() == Some(9) || status.code() == Some(137);
    let why = cause(&["error:", "mpirun was unable", "srun: error"]).map_or(String::new(), |line| format!("; {line}"));
    // Nobody but the kernel, short of memory, kills ranks so.
    match killed && why.is_empty() {
        true => (State::OutOfMemory, format!("{how}: a rank was killed, as the kernel does where memory is short")),
        false => (State::Failed, format!("{how}{why}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_apart() {
        let ended = |code: i32| ExitStatus::from_raw(code << 8);
        let state = |code, said| judge(ended(code), said).0;
        assert_eq!(state(134, "memory allocation of 4000000 bytes failed\n"), State::OutOfMemory);
        assert_eq!(state(1, "error: rank 0 on n1: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), State::OutOfMemory);
        assert_eq!(state(137, "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0"), State::OutOfMemory);
        assert_eq!(state(137, ""), State::OutOfMemory);
        assert_eq!(judge(ExitStatus::from_raw(9), "").0, State::OutOfMemory);
        let (state, reason) = judge(ended(2), "some words\nerror: data.crop is not set\n");
        assert_eq!((state, reason.as_str()), (State::Failed, "exit code 2; error: data.crop is not set"));
        assert_eq!(judge(ended(139), "").0, State::Failed);
    }

    #[test]
    fn ranks_are_placed_as_the_point_says() {
        let variant = super::super::variant::Variant::parse("sideways").unwrap();
        let point = Point { name: "p".into(), nodes: 2, ranks: 8, modules: 8, replicas: 1, batch: 1, variant };
        let words = |launcher: Launcher, ranks: usize| -> Vec<String> {
            let command = launcher.command(&Point { ranks, ..point.clone() }, &["bench", "train"]).unwrap();
            command.get_args().map(|word| word.to_string_lossy().into_owned()).collect()
        };
        // On one machine a rank has its share of the processors, if there is one.
        if open_mpi() {
            let bound =
                |ranks: usize, to: &str| words(Launcher::Mpirun, ranks).windows(2).any(|w| w == ["--bind-to", to]);
            assert!(bound(1, "hwthread") && bound(1 << 20, "none"));
        }
        let words = words(Launcher::Srun, 8);
        for word in ["--mpi=pmix", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"] {
            assert!(words.iter().any(|w| w == word), "{word} in {words:?}");
        }
        assert_eq!(words[words.len() - 2..], ["bench", "train"]);
    }
}
