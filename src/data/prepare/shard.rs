//! One shard: its videos decoded side by side, written in order.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::ffmpeg::{Decoded, Failure, Ffmpeg, Form, Target};
use super::frames::Frames;
use super::record::{Entry, FileState, Outcome, RECIPE, Record, content};
use crate::data::shard::{ShardHeader, ShardWriter};
use crate::sys::files::what;
use crate::{Error, Result};

/// A video to decode.
#[derive(Clone, Debug)]
pub struct Video {
    /// Its id.
    pub id: String,
    /// Its class.
    pub label: i32,
    /// The file.
    pub path: std::path::PathBuf,
    /// The same as it was when the run was planned.
    pub file: FileState,
}

/// How videos are decoded and stored.
#[derive(Clone, Copy, Debug)]
pub struct Recipe<'a> {
    /// The program that decodes.
    pub ffmpeg: &'a Ffmpeg,
    /// Size and rate of the frames.
    pub target: &'a Target,
    /// How frames are stored.
    pub form: Form,
    /// Videos with fewer frames are passed over.
    pub min_frames: usize,
    /// Videos decoded at a time.
    pub jobs: usize,
}

/// A shard in which not one of at least this many videos can be decoded says more about the machine than the videos.
const SUSPICIOUS: usize = 10;
/// After so many it is not waited for the shard's end.
const ENOUGH: usize = 100;

/// Makes the shard `path` of `videos`. `done` is told of each video as it is done, in order.
///
/// # Errors
/// [`Error::Input`] when `ffmpeg` cannot decode anything; [`Error::Run`] when it cannot be started or a video's file is gone;
/// [`Error::Run`] or [`Error::Io`] when the disk refuses; what `done` returns.
pub fn make(
    path: &Path,
    header: &ShardHeader,
    videos: &[Video],
    recipe: &Recipe,
    done: &mut dyn FnMut(&Entry) -> Result<()>,
) -> Result<Record> {
    let mut writer: Option<ShardWriter> = None;
    let mut entries: Vec<Entry> = Vec::with_capacity(videos.len());
    in_order(
        videos.len(),
        recipe.jobs,
        |i| recipe.decode(&videos[i].path).map(|decoded| (decoded, content(&videos[i].path))),
        |i, decoded| {
            let video = &videos[i];
            let ((outcome, frames), content) = decoded?;
            if let Outcome::Written { .. } = outcome {
                let mut open = match writer.take() {
                    Some(open) => open,
                    None => ShardWriter::create(path, header.clone())?,
                };
                open.append(&video.id, video.label, frames.iter())?;
                writer = Some(open);
            }
            let file = FileState { content, ..video.file.clone() };
            let entry = Entry { id: video.id.clone(), label: Some(video.label), file, outcome };
            done(&entry)?;
            entries.push(entry);
            if entries.len() == ENOUGH { refuse_if_all_broken(path, &entries) } else { Ok(()) }
        },
    )?;
    if entries.len() >= SUSPICIOUS {
        refuse_if_all_broken(path, &entries)?;
    }
    let bytes = match writer {
        Some(writer) => {
            let path = writer.finish()?;
            std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len()
        }
        None => {
            // One of an earlier run, when its videos were still good.
            if let Err(e) = std::fs::remove_file(path)
                && e.kind() != std::io::ErrorKind::NotFound
            {
                return Err(Error::io(path, e));
            }
            0
        }
    };
    Ok(Record { bytes, videos: entries, recipe: RECIPE })
}

/// A video is broken if its file can be opened or its permissions forbid it; else the file system has changed under the run,
/// and no video must be given up for that.
fn broken(path: &Path, why: String) -> Result<Outcome> {
    // To open a named pipe would be to wait for whoever writes to it.
    if let Some(what) = std::fs::metadata(path).ok().and_then(|meta| what(&meta)) {
        return Ok(Outcome::Broken { why: format!("{what}, no file") });
    }
    match std::fs::File::open(path) {
        Err(e) if e.kind() != std::io::ErrorKind::PermissionDenied => Err(Error::Run(format!(
            "{}: was there when the run was planned and cannot be opened now: {e}. Once the folder of videos is there \
             again on every node, the same command goes on",
            path.display()
        ))),
        _ => Ok(Outcome::Broken { why }),
    }
}

fn refuse_if_all_broken(path: &Path, entries: &[Entry]) -> Result<()> {
    let mut why = None;
    for entry in entries {
        let Outcome::Broken { why: reason } = &entry.outcome else { return Ok(()) };
        why.get_or_insert((&entry.id, reason));
    }
    let Some((id, why)) = why else { return Ok(()) };
    Err(Error::input(format!(
        "{}: not one of this shard's first {} videos can be decoded; {id}: {why}. Is something wrong with ffmpeg or the file \
         system? If the videos really are broken, list them in a file for --skip",
        path.display(),
        entries.len()
    )))
}

impl Recipe<'_> {
    /// Decodes one video: what became of it, and its frames.
    fn decode(&self, path: &Path) -> Result<(Outcome, Frames)> {
        let mut decoded = self.shown(path)?;
        if let Err(Failure { why, killed: true }) = &decoded {
            log::warn!("{}: {why} (out of memory?); it is tried once more", path.display());
            self.ffmpeg.free_memory();
            decoded = self.shown(path)?;
        }
        Ok(match decoded {
            Ok((Decoded { complaint, .. }, frames)) if frames.len() >= self.min_frames.max(1) => {
                (Outcome::Written { frames: frames.len() as u64, complaint }, frames)
            }
            Ok((Decoded { complaint: Some(why), .. }, frames)) if frames.is_empty() => (broken(path, why)?, frames),
            Ok((_, frames)) => (Outcome::Short { frames: frames.len() as u64 }, Frames::default()),
            Err(Failure { why, .. }) => (broken(path, why)?, Frames::default()),
        })
    }

    /// What ffmpeg makes of the stream that players show.
    fn shown(&self, path: &Path) -> Result<std::result::Result<(Decoded, Frames), Failure>> {
        let of_stream = |stream| self.ffmpeg.decode(path, self.target, self.form, stream);
        let decoded = of_stream(None)?;
        let Ok((Decoded { shown: Some(stream), .. }, _)) = decoded else { return Ok(decoded) };
        drop(decoded);
        of_stream(Some(stream))
    }
}

/// Computes `make(0..n)` on `threads` threads and gives the results to `take` in order, in the calling thread. No more than
/// twice as many results as threads wait in memory. Ends early when `take` fails.
fn in_order<T: Send>(
    n: usize,
    threads: usize,
    make: impl Fn(usize) -> T + Sync,
    mut take: impl FnMut(usize, T) -> Result<()>,
) -> Result<()> {
    struct State<T> {
        next: usize,
        taken: usize,
        stop: bool,
        ready: BTreeMap<usize, T>,
    }
    /// Tells the other threads to stop when its owner ends early, by an error or a panic.
    struct Stop<'a, T>(&'a Mutex<State<T>>, &'a Condvar);
    impl<T> Drop for Stop<'_, T> {
        fn drop(&mut self) {
            lock(self.0).stop = true;
            self.1.notify_all();
        }
    }
    fn lock<T>(state: &Mutex<State<T>>) -> MutexGuard<'_, State<T>> {
        state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    let threads = threads.max(1);
    let state = Mutex::new(State { next: 0, taken: 0, stop: false, ready: BTreeMap::new() });
    let changed = Condvar::new();
    let wait = |guard| changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
    let work = || {
        // Only a panic makes a thread end before all is done; the others must not wait for its result then.
        let mut guard = lock(&state);
        loop {
            if guard.stop || guard.next == n {
                return;
            }
            if guard.next >= guard.taken.saturating_add(threads.saturating_mul(2)) {
                guard = wait(guard);
                continue;
            }
            let i = guard.next;
            guard.next += 1;
            drop(guard);
            let panicked = Stop(&state, &changed);
            let made = make(i);
            std::mem::forget(panicked);
            guard = lock(&state);
            guard.ready.insert(i, made);
            changed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.min(n) {
            scope.spawn(work);
        }
        let _stop = Stop(&state, &changed);
        for i in 0..n {
            let mut guard = lock(&state);
            let made = loop {
                match guard.ready.remove(&i) {
                    Some(made) => break made,
                    // A decoder panicked; the scope passes its panic on.
                    None if guard.stop => return Ok(()),
                    None => guard = wait(guard),
                }
            };
            guard.taken = i + 1;
            drop(guard);
            changed.notify_all();
            take(i, made)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_errors_end_it() {
        for threads in [1, 3, 8] {
            let mut got = Vec::new();
            let unequal = |i: usize| {
                std::thread::sleep(std::time::Duration::from_millis((i as u64 % 4) * 2));
                i * i
            };
            in_order(20, threads, unequal, |i, x| {
                assert_eq!(x, i * i);
                got.push(i);
                Ok(())
            })
            .unwrap();
            assert!(got.into_iter().eq(0..20));
        }
        let error = in_order(1000, 2, |i| i, |i, _| if i == 5 { Err(Error::input("five")) } else { Ok(()) });
        assert_eq!(error.unwrap_err().to_string(), "five");
        in_order(0, 2, |i| i, |_, _| Ok(())).unwrap();
    }
}
