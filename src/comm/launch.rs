//! Which launcher, if any, started this process: read from the environment, before MPI is touched.

use crate::{Error, Result};

/// How this process was started.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Launch {
    /// By hand, or plainly from a batch script: one process.
    Alone,
    /// As a rank of an MPI job. `size`: how many ranks the launcher says there are, if it does.
    Rank { size: Option<usize>, by: &'static str },
}

/// Step numbers from here up are Slurm's own: batch script, interactive shell, external step.
const SLURM_SPECIAL_STEP: u64 = 0xffff_fff0;

/// Reads the environment through `get`.
///
/// The shell of `salloc` and the script of `sbatch` have Slurm's variables too, `SLURM_NTASKS` and even
/// `SLURM_PROCID`, but are no task of a step: a program run plainly there is one process. `mpirun` inside a Slurm
/// job inherits the variables of the step that runs its daemons, so its own come first.
///
/// Fails when `srun` started several tasks without an MPI plug-in: each would think it is alone.
pub(super) fn detect(get: impl Fn(&str) -> Option<String>) -> Result<Launch> {
    let number = |name: &str| get(name).and_then(|value| value.trim().parse::<usize>().ok());
    if let Some(size) = number("OMPI_COMM_WORLD_SIZE") {
        return Ok(Launch::Rank { size: Some(size), by: "OMPI_COMM_WORLD_SIZE" });
    }
    let special = |step: &String| step.trim().parse::<u64>().is_ok_and(|step| step >= SLURM_SPECIAL_STEP);
    let step = get("SLURM_STEP_ID").filter(|step| !special(step)).is_some() && get("SLURM_PROCID").is_some();
    let tasks = match step {
        true => number("SLURM_STEP_NUM_TASKS").or_else(|| number("SLURM_NTASKS")),
        false => None,
    };
    if let Some(size) = number("PMI_SIZE") {
        return Ok(Launch::Rank { size: Some(size), by: "PMI_SIZE" });
    }
    if get("PMIX_RANK").is_some() || get("PMI_RANK").is_some() || get("PMI_FD").is_some() {
        return Ok(match tasks {
            Some(size) => Launch::Rank { size: Some(size), by: "SLURM_NTASKS" },
            None => Launch::Rank { size: None, by: "PMIx" },
        });
    }
    match tasks {
        Some(tasks) if tasks > 1 => Err(Error::input(format!(
            "srun started {tasks} tasks (SLURM_NTASKS) but offers them no way to find each other, so each would run \
             alone: use `srun --mpi=pmix` (see `srun --mpi=list`), or set MpiDefault=pmix in slurm.conf"
        ))),
        _ => Ok(Launch::Alone),
    }
}

/// Whether a launcher started this process as a rank of a job, or tried to. Its standard output is then the launcher's: Open MPI's
/// mpirun gives each rank a terminal of its own, and passes on what is written to wherever its own output goes.
pub fn is_rank() -> bool {
    !matches!(detect(|name| std::env::var(name).ok()), Ok(Launch::Alone))
}

/// Compares the ranks MPI found with those the launcher promised.
pub(super) fn check_size(size: usize, expected: Option<usize>, by: &str) -> Result<()> {
    match expected {
        Some(expected) if expected != size && size == 1 => Err(Error::input(format!(
            "{expected} processes were started ({by}) but MPI found only 1 rank in each: the launcher and the MPI \
             library do not know each other. Under Slurm use `srun --mpi=pmix`; else the mpirun of the same MPI library"
        ))),
        Some(expected) if expected != size => Err(Error::input(format!(
            "{expected} processes were started ({by}) but MPI has {size} ranks: start all ranks with one srun or mpirun"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Result<Launch> {
        detect(|name| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn plain_runs_are_alone() {
        assert_eq!(with(&[]).unwrap(), Launch::Alone);
        // The shell of salloc; the script of sbatch; an interactive step; one task of srun.
        assert_eq!(with(&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "8")]).unwrap(), Launch::Alone);
        assert_eq!(with(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")]).unwrap(), Launch::Alone);
        let interactive = [("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "4294967290")];
        assert_eq!(with(&interactive).unwrap(), Launch::Alone);
        let single = [("SLURM_NTASKS", "1"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0")];
        assert_eq!(with(&single).unwrap(), Launch::Alone);
    }

    #[test]
    fn ranks_are_recognised() {
        let rank = |size, by| Launch::Rank { size, by };
        let mpirun = [("OMPI_COMM_WORLD_SIZE", "16"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "4")];
        assert_eq!(with(&mpirun).unwrap(), rank(Some(16), "OMPI_COMM_WORLD_SIZE"));
        let srun = [("PMIX_RANK", "3"), ("SLURM_PROCID", "3"), ("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "8")];
        assert_eq!(with(&srun).unwrap(), rank(Some(8), "SLURM_NTASKS"));
        assert_eq!(with(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]).unwrap(), rank(Some(2), "PMI_SIZE"));
        assert_eq!(with(&[("PMIX_RANK", "1")]).unwrap(), rank(None, "PMIx"));
    }

    #[test]
    fn silent_singletons_are_refused() {
        let error = with(&[("SLURM_PROCID", "2"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "4")]).unwrap_err();
        assert!(error.to_string().contains("srun --mpi=pmix") && error.exit_code() == 2, "{error}");
        assert!(check_size(1, Some(8), "SLURM_NTASKS").unwrap_err().to_string().contains("--mpi=pmix"));
        assert!(check_size(4, Some(8), "SLURM_NTASKS").unwrap_err().to_string().contains("4 ranks"));
        assert!(check_size(8, Some(8), "SLURM_NTASKS").is_ok() && check_size(8, None, "PMIx").is_ok());
    }
}
