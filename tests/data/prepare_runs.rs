//! `sideways data prepare` as users run it: on several ranks, killed and run again, on a full disk, with files missing.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::common::mpirun::{children, descendants, ended, mpirun, text};
use crate::common::program::{MINUTE, PROGRAM, wait_for};
use crate::common::skip_unless_ci;
use crate::common::tmpfs::Tmpfs;
use sideways::data::prepare::record::State;
use sideways::data::{Dataset, ShardReader};

/// A small Kinetics: `n` clips of four classes, in a flat folder.
struct Clips {
    dir: tempfile::TempDir,
    one: PathBuf,
    per_shard: usize,
}

impl Clips {
    fn new(n: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("videos/train")).unwrap();
        let one = path("one.mp4");
        let status = Command::new("ffmpeg")
            .args(["-nostdin", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=32x24:rate=10", "-t", "2"])
            .args(["-pix_fmt", "yuv420p"])
            .arg(&one)
            .stdin(Stdio::null())
            .status()
            .expect("the tests of `data prepare` need ffmpeg");
        assert!(status.success());
        let mut csv = String::from("label,youtube_id,time_start,time_end,split\n");
        for i in 0..n {
            csv += &format!("\"class {}\",{},3,13,train\n", i % 4, Self::id(i));
        }
        std::fs::write(path("train.csv"), csv).unwrap();
        let description =
            "name = 'tiny'\nlayout = 'kinetics'\n[splits.train]\nannotations = ['train.csv']\nvideos = ['train']\n";
        std::fs::write(path("dataset.toml"), description).unwrap();
        let clips = Clips { dir, one, per_shard: 4 };
        (0..n).for_each(|i| clips.put(i));
        clips
    }

    fn id(i: usize) -> String {
        format!("-_a-b_c_d{i:02}")
    }

    fn file(&self, i: usize) -> PathBuf {
        self.path(&format!("videos/train/{}_000003_000013.mp4", Self::id(i)))
    }

    fn put(&self, i: usize) {
        std::fs::copy(&self.one, self.file(i)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn args(&self, out: &Path, more: &[&str]) -> Vec<String> {
        let (dir, videos, per_shard) = (self.dir.path().display(), self.path("videos"), self.per_shard);
        let base = format!(
            "data prepare --dataset {dir} --annotations {dir} --split train --per-shard {per_shard} --short-side 24"
        );
        let base = base.split(' ').map(str::to_string);
        base.chain(["--videos".into(), videos.display().to_string(), "--out".into(), out.display().to_string()])
            .chain(more.iter().map(|arg| arg.to_string()))
            .collect()
    }

    fn run(&self, out: &Path, more: &[&str]) -> Output {
        Command::new(PROGRAM).args(self.args(out, more)).stdin(Stdio::null()).output().unwrap()
    }

    fn ranks(&self, n: usize, out: &Path, more: &[&str]) -> Output {
        let args = self.args(out, more);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        mpirun(n, Path::new(PROGRAM), &args, &[], MINUTE)
    }

    /// A `PATH` on which ffmpeg does something before it decodes.
    fn with_ffmpeg(&self, before: &str) -> String {
        let folder = self.path("bin");
        if !folder.exists() {
            std::fs::create_dir(&folder).unwrap();
            let real = Command::new("sh").args(["-c", "command -v ffmpeg"]).output().unwrap();
            let real = String::from_utf8(real.stdout).unwrap();
            let script = format!("#!/bin/sh\n[ \"$1\" = -version ] || {before}\nexec {} \"$@\"\n", real.trim());
            std::fs::write(folder.join("ffmpeg"), script).unwrap();
            std::fs::set_permissions(folder.join("ffmpeg"), PermissionsExt::from_mode(0o755)).unwrap();
        }
        format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
    }

    /// Starts a run whose ffmpeg takes a little longer, so that it can be met half way.
    fn spawn(&self, command: &mut Command) -> Child {
        let path = self.with_ffmpeg("sleep ${SLOW:-0.1}");
        command.env("PATH", path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// With `--json` and `--quiet` one object, and nothing else; on several ranks too.
#[test]
fn what_was_prepared_is_one_json_object() {
    let clips = Clips::new(6);
    std::fs::write(clips.file(1), "no video").unwrap();
    for ranks in [0, 2] {
        let out = clips.path(&format!("json-{ranks}"));
        let more = ["--json", "--quiet"];
        let output = if ranks == 0 { clips.run(&out, &more) } else { clips.ranks(ranks, &out, &more) };
        let said: serde_json::Value = serde_json::from_str(&succeeded(&output)).unwrap();
        let split = &said["splits"][0];
        let counts = ["listed", "found", "missing", "skipped", "broken", "too_short", "written", "doubtful"];
        assert_eq!(counts.map(|key| split[key].as_u64().unwrap()), [6, 6, 0, 0, 1, 0, 5, 0], "{said}");
        assert_eq!((split["shards"].as_array().unwrap().len(), split["frames"].as_u64()), (2, Some(5 * 50)), "{said}");
        assert!(
            split["quarantine_list"].is_string() && split["missing_list"].is_null() && said["unused"] == 0,
            "{said}"
        );
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{}", text(output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The number in a line of the report.
fn count(report: &str, line: &str) -> usize {
    let found = report.lines().find_map(|l| l.trim().strip_prefix(line)).unwrap_or_else(|| panic!("{line}? {report}"));
    found.split_whitespace().next().unwrap().parse().unwrap()
}

/// Every shard's bytes.
fn shards(out: &Path) -> BTreeMap<String, Vec<u8>> {
    files(out, "h5").into_iter().map(|name| (name.clone(), std::fs::read(out.join(name)).unwrap())).collect()
}

fn files(out: &Path, ending: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(out) else { return Vec::new() };
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|n| n.rsplit('.').next() == Some(ending)).collect();
    names.sort();
    names
}

/// Inode and time of change of each finished shard: what a run that keeps it does not touch.
fn identity(out: &Path) -> BTreeMap<String, (u64, i64)> {
    let of = |name: &String| std::fs::metadata(out.join(name)).map(|m| (m.ino(), m.mtime_nsec())).unwrap();
    let records = files(&out.join(".prepare/train"), "json").into_iter().filter(|name| name != "plan.json");
    let shards = records.map(|name| format!("train-{}", name.replace(".json", ".h5")));
    shards.map(|name| (name.clone(), of(&name))).collect()
}

#[test]
fn shards_are_the_same_on_any_number_of_ranks_and_after_any_kill() {
    let clips = Clips { per_shard: 3, ..Clips::new(24) };
    let (alone, ranks, killed) = (clips.path("alone"), clips.path("ranks"), clips.path("killed"));
    let report = succeeded(&clips.run(&alone, &["--jobs", "3"]));
    assert_eq!((count(&report, "found"), count(&report, "written")), (24, 24), "{report}");
    let expected = shards(&alone);
    assert_eq!(expected.len(), 8);
    let mut ids: Vec<String> = Dataset::open(&[format!("{}/*.h5", alone.display())])
        .map(|data| data.videos.into_iter().map(|video| video.id).collect())
        .unwrap();
    let shuffled = ids.clone();
    ids.sort();
    ids.dedup();
    assert!(ids.len() == 24 && ids != shuffled);

    let report = succeeded(&clips.ranks(3, &ranks, &[]));
    assert!(count(&report, "written") == 24 && report.contains("on 3 ranks"), "{report}");
    assert!(shards(&ranks) == expected, "three ranks make other shards than one");

    // Killed as a whole, at several moments.
    for finished in [0, 1, 3] {
        let mut run = clips.spawn(Command::new(PROGRAM).args(clips.args(&killed, &["--jobs", "2"])));
        let kept = identity(&killed);
        wait_for("a shard half written", || {
            identity(&killed).len() >= finished && !files(&killed, "partial").is_empty()
        });
        run.kill().unwrap();
        run.wait().unwrap();
        let now = identity(&killed);
        assert!(kept.iter().all(|(name, id)| now.get(name) == Some(id)), "{kept:?} {now:?}");
        assert!(shards(&killed).iter().all(|(name, bytes)| expected[name] == *bytes), "a shard is half written");
    }
    // One rank of two killed: the job ends.
    let kept = identity(&killed);
    let args = clips.args(&killed, &["--jobs", "1"]);
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-n", "2", PROGRAM]);
    command.args(args).env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_orte_tmpdir_base", clips.dir.path());
    files(&killed, "partial").iter().for_each(|name| std::fs::remove_file(killed.join(name)).unwrap());
    let mut job = clips.spawn(command.env("SLOW", "0.4"));
    wait_for("a shard half written", || !files(&killed, "partial").is_empty());
    let is_rank = |pid: &u32| {
        std::fs::read_link(format!("/proc/{pid}/exe"))
            .is_ok_and(|exe| exe == Path::new(PROGRAM).canonicalize().unwrap())
    };
    // A rank's own child is the same program until it is ffmpeg: that one's death costs no job.
    let victim = children(job.id()).into_iter().rfind(is_rank).expect("the job ended before a rank could be killed");
    // SAFETY: a signal to a process this test started.
    unsafe { libc::kill(victim as i32, libc::SIGKILL) };
    assert!(!job.wait().unwrap().success());
    wait_for("the lock", || State::new(&killed, "train").lock().is_ok());
    let now = identity(&killed);
    assert!(now.len() < 8 && kept.iter().all(|(name, id)| now.get(name) == Some(id)), "{kept:?} {now:?}");

    let output = clips.ranks(2, &killed, &[]);
    let report = succeeded(&output);
    assert!(report.contains(&format!("8 shards ({} made earlier)", now.len())), "{now:?} {}", text(&output));
    assert!(shards(&killed) == expected, "a resumed run makes other shards");
    assert!(files(&killed, "partial").is_empty());
    assert!(now.len() >= 3, "no shard was finished before a kill: {now:?}");
    assert!(now.iter().all(|(name, id)| identity(&killed)[name] == *id), "a finished shard was made again");
}

#[test]
fn missing_broken_and_replaced_files_change_their_own_shards_alone() {
    let clips = Clips::new(16);
    let out = clips.path("out");
    let whole = std::fs::read(&clips.one).unwrap();
    std::fs::remove_file(clips.file(3)).unwrap();
    std::fs::write(clips.file(5), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(clips.file(8), "").unwrap();
    let report = succeeded(&clips.run(&out, &[]));
    let counts = |report: &str| ["found", "missing", "skipped", "broken", "written"].map(|line| count(report, line));
    assert_eq!(counts(&report), [15, 1, 0, 2, 13], "{report}");
    assert!(report.contains("moov atom not found"), "ffmpeg's reason: {report}");
    let list = std::fs::read_to_string(out.join("quarantine-train.tsv")).unwrap();
    assert_eq!(list.lines().count(), 3, "{list}");
    assert!(list.contains("-_a-b_c_d05_000003_000013\tbroken\tmoov atom not found"), "{list}");
    let missing = std::fs::read_to_string(out.join("missing-train.tsv")).unwrap();
    assert_eq!(missing.lines().nth(1), Some("-_a-b_c_d03_000003_000013\tmissing\tno such file\t"));
    let first = identity(&out);

    // Again: nothing to do, the same report.
    let report = succeeded(&clips.run(&out, &[]));
    assert_eq!(counts(&report), [15, 1, 0, 2, 13], "{report}");
    assert_eq!(identity(&out), first);
    // The quarantine list given again: those are not tried, no shard changes.
    let skip = clips.path("skip.tsv");
    std::fs::copy(out.join("quarantine-train.tsv"), &skip).unwrap();
    let report = succeeded(&clips.run(&out, &["--skip", skip.to_str().unwrap()]));
    assert_eq!(counts(&report), [15, 1, 2, 0, 13], "{report}");
    assert!(identity(&out) == first && !out.join("quarantine-train.tsv").exists());
    // One turns up, one is replaced: at most two shards change, and the result is that of a fresh run.
    clips.put(3);
    clips.put(5);
    let report = succeeded(&clips.run(&out, &[]));
    assert_eq!(counts(&report), [16, 0, 0, 1, 15], "{report}");
    let now = identity(&out);
    let changed = first.iter().filter(|(name, id)| now[*name] != **id).count();
    assert!((1..=2).contains(&changed), "{first:?} {now:?}");
    assert!(!out.join("missing-train.tsv").exists());
    let fresh = clips.path("fresh");
    succeeded(&clips.run(&fresh, &[]));
    assert!(shards(&out) == shards(&fresh));
    let loses = |name: &String| ShardReader::open(&out.join(name)).unwrap().videos() < 4;
    assert_eq!(files(&out, "h5").iter().filter(|name| loses(name)).count(), 1);

    // A video that was good is to be left out: its shard changes.
    std::fs::write(&skip, "-_a-b_c_d00_000003_000013\n").unwrap();
    let report = succeeded(&clips.run(&out, &["--skip", skip.to_str().unwrap()]));
    assert_eq!(counts(&report), [16, 0, 1, 1, 14], "{report}");

    // Other settings, another run at work, and shards that are not ours.
    let other = refused(&clips.run(&out, &["--fps", "5", "--seed", "2"]));
    assert!(other.contains("other settings: fps (was 25, now 5), seed (was 1, now 2)"), "{other}");
    let lock = State::new(&out, "train").lock().unwrap();
    assert!(refused(&clips.run(&out, &[])).contains("another `sideways data` command is at work"));
    assert!(refused(&clips.ranks(2, &out, &[])).contains("is at work"));
    drop(lock);
    std::fs::remove_dir_all(out.join(".prepare")).unwrap();
    assert!(refused(&clips.run(&out, &[])).contains("4 shards of train are there already, and not from"));
    let report = succeeded(&clips.run(&out, &["--overwrite", "--fps", "5"]));
    assert_eq!(counts(&report), [16, 0, 0, 1, 15], "{report}");
}

/// Where the system kills ffmpeg for want of memory, the video is no worse than others: it gets a second try.
#[test]
fn a_decoder_that_is_killed_costs_no_video() {
    let clips = Clips::new(4);
    let once = clips.path("once");
    let kill = format!(
        "case \"$*\" in *{}*) mkdir {} 2>/dev/null && kill -9 $$;; *{}*) kill -9 $$;; esac",
        Clips::id(1),
        once.display(),
        Clips::id(2)
    );
    let out = clips.path("out");
    let mut command = Command::new(PROGRAM);
    let output = command.args(clips.args(&out, &[])).env("PATH", clips.with_ffmpeg(&kill)).output().unwrap();
    let report = succeeded(&output);
    assert!(once.exists() && text(&output).contains("it is tried once more"), "{}", text(&output));
    assert_eq!((count(&report, "written"), count(&report, "broken")), (3, 1), "{report}");
    assert!(report.contains(&format!("{}_000003_000013: ffmpeg ended with signal: 9", Clips::id(2))), "{report}");
}

#[test]
fn a_full_disk_ends_the_run_with_its_reason_and_more_room_lets_it_go_on() {
    let clips = Clips::new(12);
    let Some(disk) = Tmpfs::mount(&clips.path("small"), "700k") else { return };
    let out = disk.0.join("out");
    for full in [clips.run(&out, &["--encoding", "raw"]), clips.ranks(2, &out, &["--encoding", "raw"])] {
        assert_eq!(full.status.code(), Some(1), "{}", text(&full));
        let said = text(&full);
        assert!(said.contains("train-0000") && said.contains("No space left on device"), "{said}");
        assert!(shards(&out).len() < 3);
    }
    let kept = identity(&out);
    disk.resize("8m");
    let report = succeeded(&clips.run(&out, &["--encoding", "raw"]));
    assert_eq!(count(&report, "written"), 12, "{report}");
    assert!(!kept.is_empty() && kept.iter().all(|(name, id)| identity(&out)[name] == *id), "{kept:?}");
    let made = shards(&out);
    assert_eq!(made.len(), 3);
    for name in made.keys() {
        let shard = ShardReader::open(&out.join(name)).unwrap();
        (0..shard.videos()).for_each(|v| shard.verify(v).unwrap());
    }
}

/// A decoder whose program is killed does not go on.
#[test]
fn decoders_end_with_the_program() {
    let clips = Clips::new(2);
    let path = clips.with_ffmpeg("exec sleep 300");
    let mut command = Command::new(PROGRAM);
    command.args(clips.args(&clips.path("out"), &["--encoding", "raw", "--jobs", "2"])).env("PATH", path);
    let mut run = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut decoders = Vec::new();
    wait_for("two decoders", || {
        decoders = descendants(run.id());
        decoders.len() == 2
    });
    run.kill().unwrap();
    run.wait().unwrap();
    wait_for("the end of the decoders", || decoders.iter().all(|&id| ended(id)));
}

/// Where the system has no memory for frames, no video is to blame.
#[test]
fn no_room_for_frames_ends_the_run() {
    let clips = Clips::new(2);
    let path =
        clips.with_ffmpeg("{ echo '[error] av_interleaved_write_frame(): No space left on device' >&2; exit 1; }");
    let out = clips.path("out");
    let mut command = Command::new(PROGRAM);
    let output = command.args(clips.args(&out, &["--encoding", "raw"])).env("PATH", path).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        text(&output).contains("no file in memory") && text(&output).contains("No space left"),
        "{}",
        text(&output)
    );
    assert_eq!(count(&succeeded(&clips.run(&out, &["--encoding", "raw"])), "written"), 2);
}

/// Nor where files may not be as large as a video's frames, or as a shard.
#[test]
fn a_limit_on_the_size_of_files_ends_the_run() {
    let clips = Clips { per_shard: 12, ..Clips::new(12) };
    let out = clips.path("out");
    let limited = |blocks: u32| {
        let script = format!("ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, PROGRAM])
            .args(clips.args(&out, &["--encoding", "raw", "--jobs", "1"]))
            .output()
            .unwrap()
    };
    // Blocks of 512 bytes. A video has 20 frames of 32 x 24 pixels, 46 080 bytes; a shard twelve videos.
    for (blocks, said) in [(60, "no file in memory"), (400, "train-0000")] {
        let output = limited(blocks);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains(said) && text(&output).contains("File too large"), "{}", text(&output));
        assert!(shards(&out).is_empty());
    }
    assert_eq!(count(&succeeded(&clips.run(&out, &["--encoding", "raw"])), "written"), 12);
}

#[test]
fn what_cannot_be_read_or_decoded_at_all_is_refused() {
    let clips = Clips { per_shard: 12, ..Clips::new(12) };
    let out = clips.path("out");
    let none = Command::new(PROGRAM).args(clips.args(&out, &["--annotations"])).output().unwrap();
    assert!(refused(&none).contains("a value is required for '--annotations"), "{}", text(&none));
    // An ffmpeg that fails on whatever file it is given is no reason to call a dataset broken.
    let bad = clips.path("bad");
    std::fs::create_dir(&bad).unwrap();
    let script =
        "#!/bin/sh\ncase \"$*\" in *file:*) echo no codec >&2; exit 1;; esac\nPATH=${PATH#*:} exec ffmpeg \"$@\"\n";
    std::fs::write(bad.join("ffmpeg"), script).unwrap();
    std::fs::set_permissions(bad.join("ffmpeg"), PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", bad.display());
    let output = Command::new(PROGRAM).args(clips.args(&out, &[])).env("PATH", path).output().unwrap();
    let said = refused(&output);
    assert!(
        said.contains("not one of this shard's first 12 videos can be decoded") && said.contains("no codec"),
        "{said}"
    );
    let output =
        Command::new(PROGRAM).args(clips.args(&clips.path("o2"), &[])).env("PATH", "/nowhere").output().unwrap();
    assert!(refused(&output).contains("cannot run `ffmpeg`"), "{}", text(&output));

    // A folder without permission, for someone who is not root.
    let videos = clips.path("videos/train");
    std::fs::set_permissions(clips.dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    std::fs::set_permissions(&videos, PermissionsExt::from_mode(0o000)).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(clips.args(&clips.path("o3"), &[])).stdin(Stdio::null());
    // SAFETY: plain query.
    if unsafe { libc::geteuid() } == 0 {
        command.uid(65534).gid(65534);
    }
    let output = command.output();
    std::fs::set_permissions(&videos, PermissionsExt::from_mode(0o755)).unwrap();
    match output {
        // The program lies where only root can read it.
        Err(e) => skip_unless_ci(&format!("the program cannot be run as another user: {e}")),
        Ok(output) => {
            let said = refused(&output);
            assert!(said.contains("videos/train: cannot read this folder: Permission denied"), "{said}");
        }
    }
}

#[test]
fn inspect_names_damaged_videos_draws_a_sheet_and_fails() {
    let clips = Clips::new(8);
    let out = clips.path("out");
    succeeded(&clips.run(&out, &["--encoding", "raw"]));
    let sheet = clips.path("sheet.png");
    let inspect = || {
        let args = ["data", "inspect", out.to_str().unwrap(), "--sheet", sheet.to_str().unwrap(), "--rows", "8"];
        Command::new(PROGRAM).args(args).output().unwrap()
    };
    let said = succeeded(&inspect());
    assert!(said.contains("8 videos, 400 frames of 24x32 (HxW)") && said.contains("all sound"), "{said}");
    assert!(said.contains("class 3") && said.contains("25.0 %"), "{said}");
    assert_eq!(&std::fs::read(&sheet).unwrap()[1..4], b"PNG");
    std::fs::remove_file(&sheet).unwrap();

    // The same shard under a second name; the byte in the middle of another changed; a third cut short.
    std::fs::copy(out.join("train-00000.h5"), out.join("train-00007.h5")).unwrap();
    let path = out.join("train-00001.h5");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let id =
        ShardReader::open(&path).unwrap().ids.into_iter().find(|id| text(&inspect()).contains(&format!("video {id}")));
    std::fs::write(out.join("train-00009.h5"), &bytes[..middle]).unwrap();
    let output = inspect();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("2 damaged:") && said.contains("train-00009.h5: not a readable HDF5 file"), "{said}");
    assert!(said.contains(&format!("train-00001.h5: video {}", id.expect("no video is named"))), "{said}");
    assert!(said.contains("4 ids occur more than once"), "{said}");
    assert!(sheet.is_file(), "no sheet of what is sound");
}
