//! Independent tasks shared out among the ranks as they ask for them: slow ones hold nobody up, and which rank did what
//! changes no result.
//!
//! Rank 0 keeps the list at a *desk*; each rank, rank 0 included, has one worker that asks the desk for a task, does it,
//! and asks again. While it works it sends tallies, so that the desk can show progress.
//!
//! | message | `step` | `batch` | payload |
//! |---|---|---|---|
//! | worker → desk: I am free | `FREE` | 0 | zeros |
//! | worker → desk: progress | `TALLY` | 0 | a [`Tally`] |
//! | desk → worker: do this | `TASK` | the task | zeros |
//! | desk → worker: no more | `END` | 0 | zeros |

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

use super::{Endpoints, Kind, LinkSpec, Receiver, Sender, World, connect};
use crate::Result;

/// Progress since the worker's last one: counts whose meaning is the tasks' own.
pub type Tally = [u32; 4];

/// Does a task, and passes on tallies while at it.
pub type Work<'a, T> = dyn Fn(u64, &mut dyn FnMut(Tally) -> Result<()>) -> Result<T> + Sync + 'a;

const FREE: u32 = 0;
const TALLY: u32 = 1;
const TASK: u32 = 2;
const END: u32 = 3;
const SHAPE: [u32; 4] = [4, 1, 1, 1];

/// A task may take as long as it takes: a rank that dies ends the job without any time limit.
const PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);
/// While nothing comes the desk looks for messages of other ranks ever less often. Its own rank's worker wakes it.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];

/// Does all `tasks`, each on whichever rank is free; returns the results of those that this rank did. Collective.
///
/// `tasks` are numbers that `work` understands; rank 0's list is what counts. `watch` is called on rank 0, in the calling
/// thread, with every tally that a `work` anywhere gives.
///
/// # Errors
/// The first error of `work` on this rank. It is for the caller to end the job then ([`World::conclude`] does): the
/// other ranks only learn of it that way.
pub fn share<T: Send>(world: &World, tasks: &[u64], work: &Work<T>, watch: &mut dyn FnMut(Tally)) -> Result<Vec<T>> {
    // Worker 0 is the desk, worker r + 1 works on rank r.
    let rank_of_worker: Vec<usize> = std::iter::once(0).chain(0..world.size()).collect();
    let links: Vec<LinkSpec> = (1..rank_of_worker.len()).flat_map(|worker| [up(worker), down(worker)]).collect();
    let mut ends = connect(world, &rank_of_worker, &links, PATIENCE)?;
    let mut worker = Worker::new(&mut ends, world.rank() + 1)?;
    if world.rank() > 0 {
        return worker.run(work);
    }
    let mut desk = Desk::new(&mut ends, rank_of_worker.len() - 1)?;
    let ended = AtomicBool::new(false);
    let desk_thread = std::thread::current();
    worker.desk = Some(desk_thread.clone());
    std::thread::scope(|scope| {
        let told = Told { ended: &ended, desk: desk_thread };
        let own = scope.spawn(move || {
            let _told = told;
            worker.run(work)
        });
        let served = desk.serve(tasks, watch, || ended.load(Ordering::Acquire));
        drop(desk);
        let done = own.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // The worker's own error says more than the desk's that came of it.
        done.and_then(|done| served.map(|()| done))
    })
}

fn up(worker: usize) -> LinkSpec {
    link(Kind::Report, 2 * worker as u32, worker, 0, format!("worker {worker} -> desk"))
}

fn down(worker: usize) -> LinkSpec {
    link(Kind::Control, 2 * worker as u32 + 1, 0, worker, format!("desk -> worker {worker}"))
}

fn link(kind: Kind, id: u32, from: usize, to: usize, name: String) -> LinkSpec {
    LinkSpec { id, kind, from, to, words: 4, depth: 4, name }
}

/// Tells the desk that its own rank's worker has ended, however it did.
struct Told<'a> {
    ended: &'a AtomicBool,
    desk: Thread,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.desk.unpark();
    }
}

/// The end that works.
struct Worker {
    number: usize,
    up: Sender,
    down: Receiver,
    /// The desk's thread, where it is in this process.
    desk: Option<Thread>,
}

impl Worker {
    fn new(ends: &mut Endpoints, number: usize) -> Result<Self> {
        Ok(Worker { number, up: ends.sender(up(number).id)?, down: ends.receiver(down(number).id)?, desk: None })
    }

    fn run<T>(&mut self, work: &Work<T>) -> Result<Vec<T>> {
        let mut done = Vec::new();
        loop {
            self.tell(FREE, [0; 4])?;
            let (header, _) = self.down.wait_any()?;
            self.down.release()?;
            if header.step == END {
                self.up.flush()?;
                return Ok(done);
            }
            done.push(work(header.batch.number, &mut |tally| self.tell(TALLY, tally))?);
        }
    }

    fn tell(&mut self, what: u32, tally: Tally) -> Result<()> {
        let header = up(self.number).header(0, what, SHAPE);
        // Counts below 2^24 are exact as floats.
        self.up.send(&header, &tally.map(|n| n as f32))?;
        self.desk.iter().for_each(Thread::unpark);
        Ok(())
    }
}

/// The end that hands out.
struct Desk {
    workers: Vec<(Receiver, Sender)>,
}

impl Desk {
    fn new(ends: &mut Endpoints, workers: usize) -> Result<Self> {
        let ends = (1..=workers).map(|w| Ok((ends.receiver(up(w).id)?, ends.sender(down(w).id)?)));
        Ok(Desk { workers: ends.collect::<Result<_>>()? })
    }

    /// Serves until every worker was told that there is no more, or `failed` says that this rank's own has ended early.
    fn serve(&mut self, tasks: &[u64], watch: &mut dyn FnMut(Tally), failed: impl Fn() -> bool) -> Result<()> {
        let mut tasks = tasks.iter().copied();
        let mut ended = vec![false; self.workers.len()];
        let [shortest, longest] = PAUSES;
        let mut pause = shortest;
        while ended.contains(&false) {
            let mut idle = true;
            for (number, (from, to)) in self.workers.iter_mut().enumerate() {
                while !ended[number] && from.ready()? {
                    idle = false;
                    let (header, payload) = from.wait_any()?;
                    let tally: Vec<u32> = payload.iter().map(|&x| x as u32).collect();
                    from.release()?;
                    if header.step == TALLY {
                        watch(tally.try_into().unwrap_or_default());
                        continue;
                    }
                    let task = tasks.next();
                    ended[number] = task.is_none();
                    let answer = if task.is_some() { TASK } else { END };
                    to.send(&down(number + 1).header(task.unwrap_or(0), answer, SHAPE), &[0.0; 4])?;
                    if task.is_none() {
                        to.flush()?;
                    }
                }
            }
            if failed() && !ended[0] {
                return Ok(());
            }
            match (idle, self.workers.len()) {
                (false, _) => pause = shortest,
                (true, 1) => std::thread::park(),
                (true, _) => {
                    std::thread::park_timeout(pause);
                    pause = (2 * pause).min(longest);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn alone_every_task_is_done_once_in_order_and_tallies_arrive() {
        let mut sum = [0; 4];
        let work = |task: u64, tell: &mut dyn FnMut(Tally) -> Result<()>| {
            (0..3).try_for_each(|_| tell([1, task as u32, 0, 7]))?;
            Ok(task)
        };
        let mut watch = |t: Tally| sum.iter_mut().zip(t).for_each(|(s, x)| *s += x);
        let done = share(&World::Alone, &[5, 3, 9], &work, &mut watch).unwrap();
        assert_eq!((done, sum), (vec![5, 3, 9], [9, 51, 0, 63]));
        assert!(share(&World::Alone, &[], &work, &mut |_| ()).unwrap().is_empty());
    }

    #[test]
    fn an_error_ends_the_sharing() {
        let work = |task: u64, _: &mut dyn FnMut(Tally) -> Result<()>| match task {
            2 => Err(Error::input("two")),
            task => Ok(task),
        };
        let error = share(&World::Alone, &[1, 2, 3], &work, &mut |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "two");
    }
}
