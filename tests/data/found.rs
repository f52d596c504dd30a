//! A file stands for the entry that was asked for, or that is missing; what is not used is named. No video is decoded here.

use crate::layouts::{Disk, rows};
use sideways::data::prepare::description::{Description, Layout};
use sideways::data::prepare::layout::{Listing, Place, Unused, list};

const UCF: [(&str, &str); 2] = [("lists/classInd.txt", "1 A\n2 B\n"), ("lists/testlist01.txt", "A/002.avi\n")];

fn ucf(files: &[&str], train: &str) -> Result<Listing, String> {
    let files: Vec<(&str, &str)> = UCF.into_iter().chain(files.iter().map(|name| (*name, ""))).collect();
    let disk = Disk::new(&files);
    disk.write("lists/trainlist01.txt", train);
    disk.list(&Description::plain(Layout::Ucf101, "u"), "train1")
}

fn paths(listing: &Listing) -> Vec<Option<&str>> {
    rows(listing).into_iter().map(|row| row.2).collect()
}

#[test]
fn a_file_of_another_class_stands_for_nothing() {
    let both = "A/001.avi 1\nB/001.avi 2\n";
    let one = ucf(&["videos/A/002.avi", "videos/B/001.avi"], both).unwrap();
    assert_eq!(paths(&one), [None, Some("B/001.avi")]);
    // Nor one in a folder that is no class's, where others are.
    let other = ucf(&["videos/C/001.avi", "videos/B/001.avi"], both).unwrap();
    assert_eq!(paths(&other), [None, Some("B/001.avi")]);
    // In folders of another kind, or in none, the name alone has to tell.
    assert_eq!(paths(&ucf(&["videos/part/001.avi"], "A/001.avi 1\n").unwrap()), [Some("part/001.avi")]);
    assert_eq!(paths(&ucf(&["videos/001.avi", "videos/B/2.avi"], "A/001.avi 1\n").unwrap()), [Some("001.avi")]);
    let error = ucf(&["videos/001.avi"], both).unwrap_err();
    assert!(error.contains("001.avi: two classes list a file of this name"), "{error}");
    // As a folder a level deeper has it, and in another spelling.
    assert_eq!(paths(&ucf(&["videos/x/A/001.avi"], "A/001.avi 1\n").unwrap()), [Some("x/A/001.avi")]);
    let two = ucf(&["videos/x/A/001.avi", "videos/y/A/001.avi"], "A/001.avi 1\n").unwrap_err();
    assert!(two.contains("two files are called so, x/A/001.avi and y/A/001.avi"), "{two}");
    let own = ucf(&["videos/x/A/001.avi", "videos/A/001.avi"], "A/001.avi 1\n").unwrap();
    assert_eq!(paths(&own), [Some("A/001.avi")]);

    let disk = Disk::new(&[
        ("lists/ride_bike_test_split1.txt", "b.avi 1\n"),
        ("lists/smile_test_split1.txt", "b.avi 1\n"),
        ("videos/smile/b.avi", ""),
        ("videos/ride bike/c.avi", ""),
    ]);
    let hmdb = Description::plain(Layout::Hmdb51, "h");
    assert_eq!(paths(&disk.list(&hmdb, "train1").unwrap()), [None, Some("smile/b.avi")]);
    disk.write("videos/ride bike/b.avi", "");
    assert_eq!(paths(&disk.list(&hmdb, "train1").unwrap()), [Some("ride bike/b.avi"), Some("smile/b.avi")]);
}

const CSV: &str = "label,youtube_id,time_start,time_end,split\n";

#[test]
fn a_list_of_several_splits_gives_those_of_the_one_asked_for() {
    let disk = Disk::new(&[("videos/aaaaaaaaaa0_000012_000022.mp4", ""), ("videos/aaaaaaaaaa1_000012_000022.mp4", "")]);
    let kinetics = Description::plain(Layout::Kinetics, "k");
    let file = disk.path("all.csv");
    let ask = |rows: &str, split: &str| {
        disk.write("all.csv", format!("{CSV}{rows}"));
        let (videos, out) = (disk.path("videos"), disk.path("out"));
        let place =
            Place { videos: &videos, annotations: Some(&file), classes: None, stored_classes: None, out: Some(&out) };
        let listing = list(&kinetics, &place, &[split.to_string()]);
        listing
            .map(|l| l.splits[0].1.there.iter().map(|s| s.unwrap().id[..11].to_string()).collect::<Vec<_>>())
            .map_err(|e| e.to_string())
    };
    let both = "run,aaaaaaaaaa0,12,22,train\nrun,aaaaaaaaaa1,12,22,validate\n";
    assert_eq!(ask(both, "train").unwrap(), ["aaaaaaaaaa0"]);
    assert_eq!(ask(both, "val").unwrap(), ["aaaaaaaaaa1"]);
    let none = ask(both, "mine").unwrap_err();
    assert!(none.contains("is of the split \"mine\"; there are [\"train\", \"validate\"]"), "{none}");
    // A list of one split, under a name of the user's, is all of it; under another split's, none.
    let one = "run,aaaaaaaaaa0,12,22,train\nrun,aaaaaaaaaa1,12,22,train\n";
    assert_eq!(ask(one, "mine").unwrap().len(), 2);
    assert!(ask(one, "test").unwrap_err().contains("is of the split \"test\"; there are [\"train\"]"));
    // The column under other names, as other lists have it.
    for name in ["Split", "subset", "Usage"] {
        disk.write("lists/train.csv", CSV.replace("split", name) + both);
        assert_eq!(rows(&disk.list(&kinetics, "train").unwrap()).len(), 1, "{name}");
    }
    // By its name it is another split's list.
    disk.write("test.csv", format!("label,youtube_id,time_start,time_end\n{}", "run,aaaaaaaaaa0,12,22\n"));
    let (videos, test) = (disk.path("videos"), disk.path("test.csv"));
    let place = Place { videos: &videos, annotations: Some(&test), classes: None, stored_classes: None, out: None };
    let error = list(&kinetics, &place, &["train".into()]).unwrap_err().to_string();
    assert!(error.contains("this is the list of test, but --split is train"), "{error}");
}

#[test]
fn splits_have_no_video_in_common() {
    let folders = Description::plain(Layout::Folders, "f");
    let disk = Disk::new(&[("videos/a/1.mp4", ""), ("videos/b/2.mp4", "")]);
    let videos = disk.path("videos");
    let place = Place { videos: &videos, annotations: None, classes: None, stored_classes: None, out: None };
    let names = |list: &[&str]| list.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let error = list(&folders, &place, &names(&["train", "test"])).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("2 videos in common"), "{error}");
    assert!(error.to_string().contains("--test-fraction"), "{error}");
    // Folds of one dataset do: by design.
    assert!(list(&folders, &place, &names(&["train1", "train2"])).is_ok());

    // A description with folders for its splits takes no other split's, nor all of them.
    let shipped =
        Description::read(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/folders")).unwrap();
    disk.write("videos/Train/c/1.mp4", "");
    disk.write("videos/val/c/2.mp4", "");
    let error = list(&shipped, &place, &names(&["train"])).unwrap_err().to_string();
    assert!(error.contains("no folder train or training in it, though there is val of another split"), "{error}");

    // Lists: one that is the other's is refused, one that shares a few is not.
    let disk = Disk::new(&[("lists/classInd.txt", "1 A\n"), ("videos/A/1.avi", ""), ("videos/A/2.avi", "")]);
    let ucf = Description::plain(Layout::Ucf101, "u");
    let (videos, lists) = (disk.path("videos"), disk.path("lists"));
    let place = Place { videos: &videos, annotations: Some(&lists), classes: None, stored_classes: None, out: None };
    disk.write("lists/trainlist01.txt", "A/1.avi 1\nA/2.avi 1\n");
    disk.write("lists/testlist01.txt", "A/2.avi\n");
    let error = list(&ucf, &place, &names(&["train1", "test1"])).unwrap_err().to_string();
    assert!(error.contains("test1 and train1 have 1 videos in common, the first is A/2.avi"), "{error}");
    disk.write("videos/A/3.avi", "");
    disk.write("lists/testlist01.txt", "A/2.avi\nA/3.avi\n");
    assert!(list(&ucf, &place, &names(&["train1", "test1"])).is_ok());
    let one = disk.path("lists/testlist01.txt");
    let error = list(&ucf, &Place { annotations: Some(&one), ..place }, &names(&["train1"])).unwrap_err().to_string();
    assert!(error.contains("this is the list of test1"), "{error}");
}

#[test]
fn what_is_not_used_is_named_and_is_no_class() {
    let disk = Disk::new(&[
        ("videos/a/1.mp4", ""),
        ("videos/a/notes.txt", ""),
        ("videos/a/2.MTS", ""),
        ("videos/a/part2/3.mp4", ""),
        ("videos/4.mp4", ""),
        ("videos/b/5.mp4", ""),
        ("videos/__MACOSX/._1.mp4", ""),
        ("videos/shards/train-00000.h5", ""),
    ]);
    let (videos, out) = (disk.path("videos"), disk.path("videos/shards"));
    std::fs::create_dir(videos.join("empty")).unwrap();
    std::os::unix::fs::symlink("nowhere", videos.join("a/link.mp4")).unwrap();
    nix::unistd::mkfifo(&videos.join("a/pipe.mp4"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let place = Place { videos: &videos, annotations: None, classes: None, stored_classes: None, out: Some(&out) };
    let listing = list(&Description::plain(Layout::Folders, "f"), &place, &["train".into()]).unwrap();
    assert_eq!(listing.class_names, ["a", "b"]);
    let unused: Vec<Unused> = listing.unused.iter().map(Result::unwrap).collect();
    let mut unused: Vec<(&str, &str)> = unused.iter().map(|u| (u.path.as_str(), u.why.as_str())).collect();
    unused.sort();
    let expected = [
        ("4.mp4", "beside the class folders, in none"),
        ("__MACOSX", "a folder without a video in it is no class"),
        ("__MACOSX/._1.mp4", "hidden, as its name begins with a dot"),
        ("a/2.MTS", "its ending is none of a video"),
        ("a/link.mp4", "a link that leads nowhere"),
        ("a/notes.txt", "its ending is none of a video"),
        ("a/part2/3.mp4", "in a folder below its class's"),
        ("a/pipe.mp4", "a named pipe"),
        ("empty", "a folder without a video in it is no class"),
    ];
    assert_eq!(unused, expected);
    // The folder of shards may be that of the videos.
    let place = Place { out: Some(&videos), ..place };
    disk.write("videos/train-00000.h5", "");
    disk.write("videos/classes.txt", "a\nb\n");
    let listing = list(&Description::plain(Layout::Folders, "f"), &place, &["train".into()]).unwrap();
    assert!(listing.unused.iter().all(|u| !["train-00000.h5", "classes.txt"].contains(&u.unwrap().path.as_str())));

    // Of lists, what is in none of the splits asked for.
    let listing = ucf(&["videos/A/001.avi", "videos/A/002.avi", "videos/A/003.avi"], "A/001.avi 1\n").unwrap();
    assert_eq!(listing.unused.iter().map(|u| u.unwrap().path).collect::<Vec<_>>(), ["A/002.avi", "A/003.avi"]);
    // Two videos of one name cannot both be meant.
    let twice = Disk::new(&[("videos/x/a/1.mp4", ""), ("videos/y/a/1.mp4", "")]);
    twice.write("dataset.toml", "name = 'm'\nlayout = 'folders'\n[splits.train]\nvideos = ['x', 'y']\n");
    let error = twice.list(&Description::read(&twice.path("dataset.toml")).unwrap(), "train").unwrap_err();
    assert!(error.contains("two videos are called a/1.mp4, x/a/1.mp4 and y/a/1.mp4"), "{error}");
    // Folders of splits that nobody has described.
    let deeper = Disk::new(&[("videos/train/a/1.mp4", ""), ("videos/test/a/1.mp4", "")]);
    let error = deeper.list(&Description::plain(Layout::Folders, "f"), "train").unwrap_err();
    assert!(error.contains("test/a/1.mp4 lies deeper"), "{error}");
}

/// Files of a list that are there under another ending are a hint, and not taken.
#[test]
fn another_ending_is_told() {
    let disk = Disk::new(&[
        UCF[0],
        ("lists/trainlist01.txt", "A/v1.avi 1\nA/v2.avi 1\n"),
        ("videos/A/v1.mp4", ""),
        ("videos/A/v2.mp4", ""),
    ]);
    let path = |name: &str| disk.path(name).display().to_string();
    let (videos, lists, out) = (path("videos"), path("lists"), path("out"));
    let args = ["data", "prepare", "--layout", "ucf101", "--videos", &videos, "--annotations", &lists, "--out", &out];
    let output = crate::common::program::alone(&[&args[..], &["--split", "train1"]].concat());
    let said = crate::common::mpirun::text(&output);
    assert!(output.status.code() == Some(2) && said.contains("2 are missing"), "{said}");
    assert!(
        said.contains("2 videos that are listed are missing, but there with another ending: A/v1.avi is listed"),
        "{said}"
    );
}
