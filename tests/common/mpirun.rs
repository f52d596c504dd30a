//! Runs a program on several MPI ranks of this machine, and never longer than allowed.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Names what starts ranks where that is not Open MPI's `mpirun` (`make test-mpich`).
pub const LAUNCHER: &str = "SIDEWAYS_MPIRUN";

/// Runs `program args` on `n` ranks, more than cores if need be, and returns what they wrote.
///
/// A job that is still running after `timeout` is killed, ranks included, and its exit status is that of a
/// process killed by signal 9; its standard error ends with a line that says so.
pub fn mpirun(n: usize, program: &Path, args: &[&str], env: &[(&str, &str)], timeout: Duration) -> Output {
    // Jobs that start at once would race to make Open MPI's one session folder of this user ("File exists").
    let session = tempfile::tempdir().expect("a temporary folder");
    let launcher = std::env::var(LAUNCHER).unwrap_or_else(|_| "mpirun".into());
    let mut command = Command::new(&launcher);
    command.env("OMPI_MCA_orte_tmpdir_base", session.path());
    if !launcher.contains("mpich") {
        command.args(["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]);
    }
    command.args(["-n", &n.to_string()]).arg(program).args(args);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.envs(env.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut job = command.spawn().expect("mpirun starts (apt-get install openmpi-bin)");
    let (stdout, stderr) = (read(job.stdout.take().unwrap()), read(job.stderr.take().unwrap()));
    let start = Instant::now();
    let mut late = false;
    let status = loop {
        if let Some(status) = job.try_wait().expect("mpirun can be waited for") {
            break status;
        }
        if start.elapsed() > timeout {
            late = true;
            // mpirun puts each rank into a process group of its own, so its children are looked up.
            for process in descendants(job.id()).into_iter().chain([job.id()]) {
                // SAFETY: a signal to a process this test started.
                unsafe { libc::kill(process as i32, libc::SIGKILL) };
            }
            job.wait().expect("mpirun can be waited for");
            break ExitStatus::from_raw(libc::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let (stdout, mut stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    if late {
        stderr.extend(format!("\nkilled by the test after {:.0} s\n", timeout.as_secs_f64()).bytes());
    }
    Output { status, stdout, stderr }
}

/// Both outputs of a job, for assertions and for the reader of a failed one.
pub fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n--- standard output\n{out}\n--- standard error\n{err}", output.status)
}

fn read(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// Whether there is no such process any more, or only until its parent looks.
pub fn ended(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.trim().is_empty() || rest.trim_start().starts_with('Z'))
}

/// The processes that a process started, by Linux's account.
pub fn children(of: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    let lists = threads.map(|thread| std::fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    lists.flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>()).collect()
}

/// The children of a process, whichever of its threads started them, and theirs.
pub fn descendants(of: u32) -> Vec<u32> {
    children(of).into_iter().flat_map(|child| [vec![child], descendants(child)].concat()).collect()
}
