//! The `ffmpeg` program as a child process: any video file to frames of a fixed size and rate. A file that makes
//! it crash or hang costs that file, nothing more.

use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use bytesize::ByteSize;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::frames::{self, Frames, Pool};
use super::messages::Messages;
use super::quantisation::tables;
use crate::{Error, Result};

/// What frames are to look like.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Pixels.
    pub height: usize,
    /// Pixels.
    pub width: usize,
    /// Frames a second.
    pub fps: f64,
    /// What lies beyond this many seconds of a video is left out.
    pub max_seconds: f64,
    /// A video that takes longer than this to decode is broken.
    pub time_limit: Duration,
}

impl Target {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Input`] naming the value and what it has to be.
    pub fn validate(&self) -> Result<()> {
        for (name, side) in [("height", self.height), ("width", self.width)] {
            if !(1..=8192).contains(&side) {
                return Err(Error::input(format!("frames of {side} pixels {name}: it must be 1..=8192")));
            }
        }
        for (name, value, most) in [("--fps", self.fps, MAX_FPS), ("--max-seconds", self.max_seconds, MAX_SECONDS)] {
            if !(value.is_finite() && value > 0.0 && value <= most) {
                return Err(Error::input(format!("{name} {value}: it must be above 0, and at most {most}")));
            }
        }
        let (limit, most) = (self.time_limit, MAX_SECONDS as u64);
        if limit.is_zero() || limit.as_secs() > most {
            return Err(Error::input(format!("--time-limit {}: it must be 1..={most}", limit.as_secs())));
        }
        Ok(())
    }
}

/// In what form ffmpeg hands a frame over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// RGB, `[height, width, 3]` bytes.
    Rgb,
    /// A JPEG file of this quality, 1 to 100: from 90 on colour keeps its full resolution; below, it is halved (4:2:0).
    Jpeg(u8),
}

/// Frames a second, at most.
const MAX_FPS: f64 = 1000.0;
/// Seconds of a video, and of its decoding, at most: some thirty years, which ffmpeg still counts right.
const MAX_SECONDS: f64 = 1e9;

/// A video was decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// What there is to doubt, if anything: the last line of ffmpeg's errors, or that another stream may be meant.
    pub complaint: Option<String>,
    /// The stream, by number, that players show, where it is another one than was decoded.
    pub shown: Option<usize>,
}

/// A video was not decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// ffmpeg's reason.
    pub why: String,
    /// Somebody killed it, as the system does when memory runs out: another video may be to blame.
    pub killed: bool,
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Failure { why, killed: false }
    }
}

/// The `ffmpeg` program.
#[derive(Clone, Debug)]
pub struct Ffmpeg {
    /// Bytes of a video's frames, at most: they are in memory until all are decoded.
    most: usize,
    memory: Pool,
}

/// A video's frames take no more, in bytes.
const MOST: usize = 4 << 30;

/// How pictures are scaled: to the same bits on processors with other vector instructions too.
const SCALING: &str = "bicubic+accurate_rnd+bitexact";

impl Ffmpeg {
    /// Checks that `ffmpeg` can be run and writes frames in this form.
    ///
    /// # Errors
    /// [`Error::Input`] when it cannot; [`Error::Run`] when the system has no memory for it to write to.
    pub fn find(form: Form) -> Result<Self> {
        let version = Command::new("ffmpeg").arg("-version").stdin(Stdio::null()).output();
        match version {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                return Err(Error::input(format!("`ffmpeg -version` fails ({}): reinstall ffmpeg", output.status)));
            }
            Err(e) => {
                return Err(Error::input(format!(
                    "cannot run `ffmpeg`, which decodes the videos: {e}; install it (Debian: apt install ffmpeg)"
                )));
            }
        }
        let ffmpeg = Ffmpeg { most: MOST, memory: Pool::default() };
        drop(ffmpeg.memory.lend().map_err(no_memory)?);
        let written = if form == Form::Rgb { Ok(()) } else { writes(form) };
        written.map(|()| ffmpeg).map_err(|why| {
            Error::input(format!(
                "`ffmpeg` cannot write JPEG here: {why}. Install one with its encoder mjpeg and its format mpjpeg, or store frames as \
                 they are (--encoding raw)"
            ))
        })
    }

    /// Gives back to the system memory that is not in use.
    pub fn free_memory(&self) {
        self.memory.clear();
    }

    /// Decodes `path` to frames, each as `form` says. The picture is scaled to cover the target, in the shape in which players show it,
    /// and cut to it around the centre. `stream` is the number of the video's stream; else the first that is no cover picture. Of a
    /// video that cannot be decoded says why.
    ///
    /// # Errors
    /// [`Error::Run`] when `ffmpeg` cannot be started, or there is no room for frames: no video's fault.
    pub fn decode(
        &self,
        path: &Path,
        target: &Target,
        form: Form,
        stream: Option<usize>,
    ) -> Result<std::result::Result<(Decoded, Frames), Failure>> {
        let mut memory = self.memory.lend().map_err(no_memory)?;
        let out = memory.writer().map_err(no_memory)?;
        let child = self.command(path, target, form, stream).stdout(out).spawn();
        let child = child.map_err(|e| Error::Run(format!("cannot start ffmpeg: {e}")))?;
        let watched = match watch(child, path, target.time_limit) {
            Err(Failure { why, .. }) if FULL.iter().any(|full| why.contains(full)) => {
                return Err(no_memory(std::io::Error::other(why)));
            }
            Err(failure) => Err(failure),
            Ok(_) if memory.written().map_err(no_memory)? > self.most => Err(Failure::from(format!(
                "its frames take more than {}: lower --max-seconds, --fps or the frames' size",
                ByteSize::b(self.most as u64)
            ))),
            Ok((complaint, messages)) => {
                let frames = memory.frames(&self.memory, |bytes| match form {
                    Form::Rgb => frames::of_size(bytes, target.height * target.width * 3),
                    Form::Jpeg(_) => frames::in_parts(bytes),
                });
                frames.map_err(no_memory)?.map(|frames| (complaint, messages, frames)).map_err(Failure::from)
            }
        };
        Ok(watched.map(|(complaint, messages, frames)| {
            let streams = messages.streams();
            let shown = streams.iter().find(|s| s.default).or(streams.first()).map(|s| s.number);
            let shown = shown.filter(|_| stream.is_none() && shown != streams.first().map(|s| s.number));
            let several = || format!("{} video streams: the one that players show first is taken", streams.len());
            (Decoded { complaint: complaint.or_else(|| (streams.len() > 1).then(several)), shown }, frames)
        }))
    }

    fn command(&self, path: &Path, target: &Target, form: Form, stream: Option<usize>) -> Command {
        let (h, w) = (target.height, target.width);
        // As `force_original_aspect_ratio=increase`, which takes pixels for square.
        let cover = format!("w='max({w},round({h}*iw*sar/ih))':h='max({h},round({w}*ih/(iw*sar)))'");
        // As JFIF has them, whatever the video's own are.
        let colours = if form == Form::Rgb { "" } else { ":out_color_matrix=bt601:out_range=pc" };
        let (format, halved) = match form {
            Form::Rgb => ("rgb24", String::new()),
            Form::Jpeg(quality) if quality >= FULL_COLOUR => ("yuvj444p", String::new()),
            // After cutting: a picture whose colour is halved can only be cut at even pixels.
            Form::Jpeg(_) => ("yuvj420p", format!(",format=yuvj444p,scale=flags={SCALING}:in_range=pc:out_range=pc")),
        };
        // From the first picture on: where sound begins before it, it would be repeated until then.
        let filter = format!(
            "setpts=PTS-STARTPTS,fps={},scale={cover}:flags={SCALING}{colours},crop={w}:{h}{halved}",
            target.fps
        );
        let stream = stream.map_or("0:V:0".to_string(), |number| format!("0:{number}"));
        // `file:` keeps a name with a dash in front from being an option, and one with a colon from being a URL.
        let mut input = std::ffi::OsString::from("file:");
        input.push(path);
        let mut command = Command::new("ffmpeg");
        command
            .args(["-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"])
            // A playlist posing as a video must not open connections.
            .args(["-protocol_whitelist", "file,pipe"])
            // One thread each: many videos are decoded side by side.
            .args(["-threads", "1", "-filter_threads", "1", "-i"])
            .arg(input)
            .args(["-map", &stream, "-an", "-sn", "-dn", "-t", &target.max_seconds.to_string(), "-vf", &filter])
            .args(["-pix_fmt", format])
            .args(encoder(form))
            // It stops there without an error: a byte beyond the limit shows that there was more.
            .args(["-fs", &(self.most + 1).to_string()])
            // Written when its buffer is full, not after each frame too.
            .args(["-flush_packets", "0"])
            .arg("pipe:1")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec, one system call that touches no memory of this process.
        unsafe {
            // What it writes to never fails: it would go on when this program was killed.
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        command
    }
}

/// What ffmpeg says where the system has no memory left for a file there, or the limit on files' sizes is lower.
const FULL: [&str; 2] = ["No space left on device", "File too large"];

fn no_memory(e: std::io::Error) -> Error {
    Error::Run(format!(
        "there is no file in memory for ffmpeg to write frames to: {e}. Lower --jobs, or raise the limits on memory, open files \
         and files' size"
    ))
}

/// Waits for ffmpeg's end: its complaint, if it has one, and all that it said.
fn watch(mut child: Child, path: &Path, limit: Duration) -> std::result::Result<(Option<String>, Messages), Failure> {
    let Some(stderr) = child.stderr.take() else { return Err(String::from("ffmpeg has no pipe").into()) };
    let id = Pid::from_raw(child.id() as i32);
    // Dropping `done` is what tells the watchdog that all is over.
    let (done, over) = channel::<()>();
    let (messages, expired) = std::thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let expired = over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if expired {
                // It is still there, even if it has ended meanwhile: it has not been waited for.
                let _ = kill(id, Signal::SIGKILL);
            }
            expired
        });
        let messages = Messages::of(stderr);
        // Until it has ended, but leaves its number to it.
        let _ = waitid(Id::Pid(id), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        drop(done);
        (messages, watchdog.join().unwrap_or(false))
    });
    let status = child.wait().map_err(|e| format!("waiting for ffmpeg: {e}"))?;
    if expired {
        return Err(format!("took longer than {} s to decode", limit.as_secs_f64()).into());
    }
    let complaint = messages.reason(path);
    if !status.success() {
        let why = complaint.unwrap_or_else(|| format!("ffmpeg ended with {status}"));
        return Err(Failure { why, killed: status.signal() == Some(libc::SIGKILL) });
    }
    Ok((complaint, messages))
}

/// From this quality on colour keeps its full resolution.
const FULL_COLOUR: u8 = 90;

/// Whether ffmpeg writes a frame in this form; else why not. Tried on one, for it may be built without much.
fn writes(form: Form) -> std::result::Result<(), String> {
    const SIDE: usize = 16;
    let mut child = Command::new("ffmpeg")
        .args([
            "-hide_banner",
            "-nostats",
            "-loglevel",
            "error",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "yuvj444p",
            "-s",
            "16x16",
        ])
        .args(["-i", "pipe:0"])
        .args(encoder(form))
        .arg("pipe:1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    // One that has ended already says why.
    let _ = child.stdin.take().map(|mut frame| frame.write_all(&[0; 3 * SIDE * SIDE]));
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    match (output.status.success(), frames::in_parts(&output.stdout)) {
        (true, Ok(places)) if places.len() == 1 => Ok(()),
        (_, Err(why)) => Err(why),
        _ => Err(said.lines().last().map_or_else(|| output.status.to_string(), str::to_string)),
    }
}

/// How frames are written. JPEG by ffmpeg's own encoder: in this process it would take two or three times as long, of seven times as many
/// bytes.
fn encoder(form: Form) -> Vec<String> {
    let words = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
    let Form::Jpeg(quality) = form else { return words("-f rawvideo") };
    let [luminance, chrominance] = tables(quality).map(|table| table.map(|step| step.to_string()).join(","));
    // Its scale multiplies the tables by q / 8. Whatever they say it divides a block's mean by 8, so by one level of grey.
    let mut all = words("-f mpjpeg -c:v mjpeg -q:v 8 -huffman default -flags:v +bitexact -threads 1 -intra_matrix");
    all.extend([luminance, "-chroma_intra_matrix".into(), chrominance]);
    all
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn film(path: &Path, seconds: &str) {
        let source = ["-f", "lavfi", "-i", "testsrc=size=32x24:rate=10", "-t", seconds];
        let made = Command::new("ffmpeg").args(["-loglevel", "error"]).args(source).arg(path).status().unwrap();
        assert!(made.success());
    }

    fn target() -> Target {
        Target { height: 24, width: 32, fps: 10.0, max_seconds: 60.0, time_limit: Duration::from_secs(60) }
    }

    #[test]
    fn frames_that_take_too_much_memory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("film.mkv");
        film(&path, "30");
        let frame = 24 * 32 * 3;
        for (most, refused) in [(300 * frame, false), (300 * frame - 1, true), (frame, true)] {
            let ffmpeg = Ffmpeg { most, memory: Pool::default() };
            match ffmpeg.decode(&path, &target(), Form::Rgb, None).unwrap() {
                Ok((_, frames)) => assert!(!refused && frames.len() == 300, "{most}: {}", frames.len()),
                Err(Failure { why, .. }) => assert!(refused && why.contains("frames take more than"), "{most}: {why}"),
            }
        }
        // It stops soon after that much.
        let written = File::create_new(dir.path().join("written")).unwrap();
        let few = Ffmpeg { most: frame, memory: Pool::default() };
        few.command(&path, &target(), Form::Rgb, None).stdout(written.try_clone().unwrap()).output().unwrap();
        let bytes = written.metadata().unwrap().len() as usize;
        assert!((frame + 1..=30 * frame).contains(&bytes), "{bytes} bytes");
    }
}
