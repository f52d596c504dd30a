//! Which ranks there are, and what they do together before and after training.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::launch::{self, Launch};
use super::mpi::{Baseline, Session, Sums};
use crate::sys::host::hostname;
use crate::{Error, Result};

/// The ranks of this run: this process alone, or an MPI job.
///
/// Its collective methods ([`World::gather`], [`World::agree`], [`World::first_error`], [`super::connect`]) must be
/// called by all ranks in the same order, and are for the start and the end of a run: while they last, no
/// message of a link moves.
///
/// Dropped, it ends MPI and waits for the other ranks; a rank that fails alone must call [`World::conclude`] or
/// [`World::abort`] instead, and one that panics aborts the job by itself.
pub enum World {
    /// One process, its workers are threads.
    Alone,
    /// One rank of an MPI job.
    Mpi(Ranks),
}

/// A rank of an MPI job.
pub struct Ranks {
    pub(super) session: Arc<Session>,
    /// The present error is known to all ranks, so nobody needs to be stopped.
    shared_error: AtomicBool,
}

impl World {
    /// Finds out how this process was started and joins the other ranks, if there are any.
    ///
    /// MPI is initialised only when a launcher (mpirun, srun with PMIx or PMI) is seen in the environment; a
    /// program run plainly, also inside the shell of `salloc` or the script of `sbatch`, is one process. Call it once.
    ///
    /// # Errors
    /// [`Error::Input`] when the launcher started several processes that cannot find each other, or MPI does not
    /// support threads; [`Error::Transport`] when MPI fails.
    pub fn join() -> Result<World> {
        match launch::detect(|name| std::env::var(name).ok())? {
            Launch::Alone => Ok(World::Alone),
            Launch::Rank { size, by } => {
                let session = Session::start()?;
                launch::check_size(session.size, size, by)?;
                Ok(World::Mpi(Ranks { session: Arc::new(session), shared_error: AtomicBool::new(false) }))
            }
        }
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        match self {
            World::Alone => 0,
            World::Mpi(ranks) => ranks.session.rank,
        }
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        match self {
            World::Alone => 1,
            World::Mpi(ranks) => ranks.session.size,
        }
    }

    /// This process's number among those of its node (they share memory), from 0.
    pub fn local_rank(&self) -> usize {
        match self {
            World::Alone => 0,
            World::Mpi(ranks) => ranks.session.core.place.rank,
        }
    }

    /// What the MPI library calls itself; `None` alone.
    pub fn mpi_library(&self) -> Option<String> {
        match self {
            World::Alone => None,
            World::Mpi(_) => Some(super::mpi::library()),
        }
    }

    /// Whether this rank's MPI library takes addresses of GPU memory (see [`super::Outside`]).
    pub fn takes_gpu_memory(&self) -> bool {
        matches!(self, World::Mpi(_)) && super::mpi::takes_gpu_memory()
    }

    /// Has `prepare` called once in every thread before it lets MPI work: what a GPU's memory needs of a thread that
    /// touches it. Only the first call counts.
    pub fn prepare_threads(&self, prepare: impl Fn() + Send + Sync + 'static) {
        if let World::Mpi(ranks) = self {
            let _ = ranks.session.core.prepare.set(Box::new(prepare));
        }
    }

    /// How many processes the node has.
    pub fn local_size(&self) -> usize {
        match self {
            World::Alone => 1,
            World::Mpi(ranks) => ranks.session.core.place.size,
        }
    }

    /// How many processors this node's ranks may use, all together.
    pub fn local_cores(&self) -> usize {
        match self {
            World::Alone => std::thread::available_parallelism().map_or(1, |n| n.get()),
            World::Mpi(ranks) => ranks.session.core.place.cores,
        }
    }

    /// Every rank's bytes, in rank order. Collective.
    ///
    /// # Errors
    /// [`Error::Transport`] when MPI fails.
    pub fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self {
            World::Alone => Ok(vec![bytes.to_vec()]),
            World::Mpi(ranks) => ranks.session.gather(bytes, false),
        }
    }

    /// The same, where rank 0 alone needs them: nothing elsewhere. Collective.
    ///
    /// # Errors
    /// As [`World::gather`].
    pub fn gather_at_first(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self {
            World::Alone => Ok(vec![bytes.to_vec()]),
            World::Mpi(ranks) => ranks.session.gather(bytes, true),
        }
    }

    /// The bytes of the ranks of this rank's node, in the order of [`World::local_rank`]. Collective.
    ///
    /// # Errors
    /// As [`World::gather`].
    pub fn gather_on_node(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self {
            World::Alone => Ok(vec![bytes.to_vec()]),
            World::Mpi(ranks) => ranks.session.gather_on_node(bytes),
        }
    }

    /// Checks that `hash` is the same on all ranks; `what` it is of is for the error. Collective.
    ///
    /// # Errors
    /// [`Error::Input`], on every rank, naming the ranks whose hash is not rank 0's.
    pub fn agree(&self, hash: u64, what: &str) -> Result<()> {
        let mut mine = hash.to_le_bytes().to_vec();
        mine.extend(hostname().into_bytes());
        let all = self.gather(&mine)?;
        let name = |rank: usize| format!("rank {rank} ({})", String::from_utf8_lossy(&all[rank][8..]));
        let differ: Vec<usize> = (0..all.len()).filter(|&rank| all[rank][..8] != all[0][..8]).collect();
        if differ.is_empty() {
            return Ok(());
        }
        self.mark_shared();
        let names: Vec<String> = differ.iter().map(|&rank| name(rank)).collect();
        Err(Error::input(format!(
            "{what} is not the same on all ranks: {} differ from {}. Start every rank with the same files and options",
            names.join(", "),
            name(0)
        )))
    }

    /// Checks that the ranks' numbers add up to 0 (modulo 2⁶⁴), as where each thing that two ranks share counts with one sign on
    /// one of them and with the other on the other; `what` they are of is for the error. Collective.
    ///
    /// # Errors
    /// [`Error::Input`], on every rank.
    pub fn balance(&self, number: u64, what: &str) -> Result<()> {
        let all = self.gather(&number.to_le_bytes())?;
        let numbers = all.iter().filter_map(|bytes| bytes.as_slice().try_into().ok()).map(u64::from_le_bytes);
        if numbers.fold(0, u64::wrapping_add) == 0 {
            return Ok(());
        }
        self.mark_shared();
        Err(Error::input(format!(
            "{what} is not the same on all ranks: start every rank with the same program, files and options"
        )))
    }

    /// Makes one rank's error every rank's error, so that all stop together and one of them prints it. Collective.
    ///
    /// # Errors
    /// That of the lowest rank that has one, with its rank named unless all ranks have the same.
    pub fn first_error<T>(&self, result: Result<T>) -> Result<T> {
        let World::Mpi(_) = self else { return result };
        let all = self.gather(&packed(&result))?;
        let failed: Vec<usize> = (0..all.len()).filter(|&rank| !all[rank].is_empty()).collect();
        let Some(&first) = failed.first() else { return result };
        self.mark_shared();
        let mut text = String::from_utf8_lossy(&all[first][1..]).into_owned();
        if failed.len() < all.len() || failed.iter().any(|&rank| all[rank] != all[first]) {
            text = format!("rank {first}: {text}");
            if failed.len() > 1 {
                text += &format!(" (and {} more ranks failed)", failed.len() - 1);
            }
        }
        Err(unpacked(all[first][0], text))
    }

    /// Makes what rank 0 found every rank's result: others' do not count. Collective.
    ///
    /// # Errors
    /// Rank 0's.
    pub fn as_first(&self, result: Result<()>) -> Result<()> {
        let World::Mpi(_) = self else { return result };
        let mine = if self.rank() == 0 { packed(&result) } else { Vec::new() };
        match self.gather(&mine)?[0].split_first() {
            None => Ok(()),
            Some((&code, text)) => {
                self.mark_shared();
                Err(unpacked(code, String::from_utf8_lossy(text).into_owned()))
            }
        }
    }

    /// Ends this rank's run and returns the process's exit code.
    ///
    /// After success, a regular stop, or an error that all ranks share (from [`World::agree`] or
    /// [`World::first_error`]) MPI is ended in an orderly way, and rank 0 alone logs the error. An error of this
    /// rank alone is logged with its rank and host, and takes the whole job down: then this does not return.
    pub fn conclude(self, result: Result<()>) -> i32 {
        let Err(error) = result else { return 0 };
        let code = error.exit_code();
        match &self {
            World::Mpi(ranks) if self.size() > 1 => {
                let shared = ranks.shared_error.load(Ordering::Relaxed) || matches!(error, Error::Stopped(_));
                if !shared {
                    log::error!("rank {} on {}: {error}", self.rank(), hostname());
                    self.abort(code);
                }
                if self.rank() == 0 {
                    say(&error);
                }
            }
            _ => say(&error),
        }
        code
    }

    /// Ends the process at once, and with it the whole job.
    pub fn abort(&self, code: i32) -> ! {
        match self {
            World::Alone => std::process::exit(code),
            World::Mpi(ranks) => ranks.session.abort(code),
        }
    }

    /// MPI's own speed between ranks 0 and 1, to compare links with; `None` alone. Collective.
    pub(crate) fn baseline(&self, words: usize) -> Result<Option<Baseline>> {
        match self {
            World::Alone => Ok(None),
            World::Mpi(ranks) => Baseline::new(&ranks.session, words).map(Some),
        }
    }

    /// MPI's own all-reduce of `words` among all ranks, to compare ours with; `None` alone. Collective.
    pub(crate) fn sums(&self, words: usize) -> Result<Option<Sums>> {
        match self {
            World::Alone => Ok(None),
            World::Mpi(ranks) => Sums::new(&ranks.session, words).map(Some),
        }
    }

    fn mark_shared(&self) {
        if let World::Mpi(ranks) = self {
            ranks.shared_error.store(true, Ordering::Relaxed);
        }
    }
}

/// An error for other ranks: its exit code, then its text. Nothing where there is none.
fn packed<T>(result: &Result<T>) -> Vec<u8> {
    match result {
        Ok(_) => Vec::new(),
        Err(error) => [&[error.exit_code() as u8][..], error.to_string().as_bytes()].concat(),
    }
}

fn unpacked(code: u8, text: String) -> Error {
    match code {
        2 => Error::Input(text),
        75 => Error::Stopped(text),
        _ => Error::Run(text),
    }
}

/// Logs how a command ended. A run that stopped with a checkpoint has done what it was asked to.
fn say(error: &Error) {
    match error {
        Error::Stopped(_) => log::info!("{error}"),
        _ => log::error!("{error}"),
    }
}
