//! The layouts of datasets: from annotation files and file names to labels. No video is decoded here.

use std::path::{Path, PathBuf};

use sideways::data::prepare::description::{Description, Layout};
use sideways::data::prepare::layout::{Listing, Place, list};

/// A folder with files; the empty ones stand for videos.
pub struct Disk(tempfile::TempDir);

impl Disk {
    pub fn new(files: &[(&str, &str)]) -> Self {
        let disk = Disk(tempfile::tempdir().unwrap());
        files.iter().for_each(|(name, content)| disk.write(name, content));
        disk
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Lists a split of the dataset in `videos/`, with its annotations in `lists/`.
    pub fn list(&self, description: &Description, split: &str) -> Result<Listing, String> {
        let (videos, annotations) = (self.path("videos"), self.path("lists"));
        let place =
            Place { videos: &videos, annotations: Some(&annotations), classes: None, stored_classes: None, out: None };
        list(description, &place, &[split.into()]).map_err(|error| {
            assert_eq!(error.exit_code(), 2, "{error}");
            error.to_string()
        })
    }

    fn kinetics(&self, csv: impl AsRef<[u8]>) -> Result<Listing, String> {
        self.write("lists/train.csv", csv);
        self.list(&Description::plain(Layout::Kinetics, "kinetics"), "train")
    }
}

/// `(id, class, path)` of each video by id; of one that is missing the id is all there is.
pub fn rows(listing: &Listing) -> Vec<(&str, &str, Option<&str>)> {
    let videos = &listing.splits[0].1;
    let class = |label: i32| listing.class_names[label as usize].as_str();
    let text = |text: String| &*text.leak();
    let there = videos.there.iter().map(Result::unwrap).map(|s| (text(s.id), class(s.label), Some(text(s.path))));
    let missing = videos.missing.ids().map(|id| (text(id.unwrap()), "", None));
    let mut all: Vec<_> = there.chain(missing).collect();
    all.sort();
    all
}

const HEADER: &str = "label,youtube_id,time_start,time_end,split\n";

#[test]
fn kinetics_files_are_found_whatever_the_folders_are_called() {
    let disk = Disk::new(&[
        ("videos/train/passing American football (in game)/--Q3_qj3s0k_000012_000022.mp4", ""),
        // The other class, as one downloader and as another spells it.
        ("videos/train/passing_american_football_(not_in_game)/Q3_qj3s0k_a_000012_000022.mp4", ""),
        ("videos/train/massaging_persons_head/0123456789a_000000_000010.mkv", ""),
        // No class folder; the same id at another time, under another label.
        ("videos/train/0123456789a_000100_000110.mp4", ""),
        // Twice: the one in the folder of its class is taken.
        ("videos/train/aaa/bbbbbbbbbbb_000001_000011.mp4", ""),
        ("videos/train/yoga/bbbbbbbbbbb_000001_000011.mp4", ""),
        ("videos/train/notes.txt", ""),
    ]);
    let csv = HEADER.to_string()
        + "passing American football (in game),--Q3_qj3s0k,12,22,train\n\
           passing american football (not in game),Q3_qj3s0k_a,12,22,train\n\
           massaging person's head,0123456789a,0,10,train\n\
           yoga,0123456789a,100,110,train\n\
           yoga,bbbbbbbbbbb,1,11,train\n\
           yoga,ccccccccccc,5,15,train\n";
    let listing = disk.kinetics(&csv).unwrap();
    let expected = [
        (
            "--Q3_qj3s0k_000012_000022",
            "passing American football (in game)",
            Some("train/passing American football (in game)/--Q3_qj3s0k_000012_000022.mp4"),
        ),
        (
            "0123456789a_000000_000010",
            "massaging person's head",
            Some("train/massaging_persons_head/0123456789a_000000_000010.mkv"),
        ),
        ("0123456789a_000100_000110", "yoga", Some("train/0123456789a_000100_000110.mp4")),
        (
            "Q3_qj3s0k_a_000012_000022",
            "passing american football (not in game)",
            Some("train/passing_american_football_(not_in_game)/Q3_qj3s0k_a_000012_000022.mp4"),
        ),
        ("bbbbbbbbbbb_000001_000011", "yoga", Some("train/yoga/bbbbbbbbbbb_000001_000011.mp4")),
        ("ccccccccccc_000005_000015", "", None),
    ];
    assert_eq!(rows(&listing), expected);
    // Sorted by bytes: capitals first.
    assert_eq!(
        listing.class_names[1..3],
        ["passing American football (in game)", "passing american football (not in game)"]
    );

    // The same list as Windows and spreadsheets write it: byte order mark, CRLF, quotes, another order, one more column.
    let fields = |line: &str| line.split(',').map(str::to_string).collect::<Vec<_>>();
    let windows: String = csv
        .lines()
        .map(|line| {
            let f = fields(line);
            format!("0,\"{}\",{},{},{},{}\r\n", f[1], f[3], f[2], f[4], format_args!("\"{}\"", f[0]))
        })
        .collect();
    let windows = format!("\u{feff}{}", windows.replacen("0,", "is_cc,", 1));
    assert_eq!(rows(&disk.kinetics(windows).unwrap()), expected);
    // Tabs, and times with a fraction of zero.
    let tabs = csv.replace(',', "\t").replace("\t12\t22\t", "\t12.0\t22.0\t");
    assert_eq!(rows(&disk.kinetics(tabs).unwrap()), expected);
    // DeepMind's JSON has an id once.
    disk.write(
        "lists/val.json",
        r#"{"--Q3_qj3s0k": {"annotations": {"label": "yoga", "segment": [12.0, 22.0]}, "duration": 10.0, "subset": "val", "url": ""},
            "0123456789a": {"annotations": {"label": "\"quoted\" é", "segment": [100, 110]}, "subset": "val"}}"#,
    );
    let json = disk.list(&Description::plain(Layout::Kinetics, "kinetics"), "val").unwrap();
    assert_eq!(rows(&json)[1].1, "\"quoted\" é");
    assert!(rows(&json).iter().all(|row| row.2.is_some()));
}

#[test]
fn kinetics_lists_that_make_no_sense_are_refused_with_the_line() {
    let disk = Disk::new(&[("videos/0123456789a_000000_000010.mp4", "")]);
    let refused = |csv: &str| disk.kinetics(csv).unwrap_err();
    let with = |lines: &str| refused(&format!("{HEADER}{lines}"));
    let good = "yoga,0123456789a,0,10,train\n";
    assert!(refused("").contains("train.csv: this file is empty"));
    assert!(refused("\u{feff}\r\n").contains("train.csv: this file is empty"));
    assert!(with("").contains("no clips in this file, only a header"));
    let missing = refused("youtube_id,time_start,time_end,split\n0123456789a,0,10,test\n");
    assert!(missing.contains("no column \"label\"") && missing.contains("list without labels"), "{missing}");
    assert!(refused("label,youtube_id,time_end\nyoga,0123456789a,10\n").contains("no column \"time_start\""));
    assert!(refused(good).contains("The first line must name the columns"));
    let short = with("yoga,0123456789a,0\n");
    assert!(short.contains("line 2: 3 values, not 5"), "{short}");
    assert!(
        with(&format!("{good}yoga,0123456789,0,10,train\n")).contains("line 3: \"0123456789\" is not a YouTube id")
    );
    assert!(with("yoga,0123456789a,zero,10,train\n").contains("line 2: \"zero\" is not a time"));
    assert!(with("yoga,0123456789a,10,10,train\n").contains("line 2: the clip ends at 10 s"));
    assert!(with(",0123456789a,0,10,train\n").contains("line 2: the label is empty"));
    assert!(with("\"yoga,0123456789a,0,10,train\n").contains("line 2: 1 values, not 5: is a quote"));
    let conflict = with(&format!("{good}swimming,0123456789a,0,10,train\n"));
    assert!(conflict.contains("line 3: 0123456789a_000000_000010 is \"swimming\" here and \"yoga\" at"), "{conflict}");
    disk.write("lists/train.csv", b"label,youtube_id,time_start,time_end\ncaf\xe9,0123456789a,0,10\n");
    assert!(
        disk.list(&Description::plain(Layout::Kinetics, "k"), "train").unwrap_err().contains("line 2 is not UTF-8")
    );
    // An exact repetition counts once.
    assert_eq!(disk.kinetics(format!("{HEADER}{good}{good}")).unwrap().splits[0].1.there.len(), 1);
    let elsewhere = with("yoga,0123456789b,0,10,train\n");
    assert!(elsewhere.contains("none of its 1 clips is among the 1 videos below"), "{elsewhere}");
    let absent = disk.list(&Description::plain(Layout::Kinetics, "k"), "val").unwrap_err();
    assert!(
        absent.contains("no val.csv or val.json or val.txt in this folder") && absent.contains("train.csv"),
        "{absent}"
    );
}

/// The lists as they are handed around: two sizes of the dataset in one folder under their own names, the smaller with a column more,
/// and beside them the challenge's lists, which have no labels.
#[test]
fn kinetics_lists_of_two_sizes_lie_in_one_folder() {
    let columns = "label,youtube_id,time_start,time_end,split";
    let small = format!("{columns},is_cc\nabseiling,0123456789a,417,427,val,0\nriding mule,-_123456789,3,13,val,1\n");
    let large = format!("{columns}\nabseiling,0123456789b,38,48,val\nmassaging person's head,0123456789c,0,10,val\n");
    let disk = Disk::new(&[
        ("lists/kinetics-400_val.csv", &small),
        ("lists/kinetics-600_val.csv", &large),
        ("lists/kinetics-400_test.csv", "youtube_id,time_start,time_end,split\n0123456789d,17,27,test\n"),
        ("lists/kinetics-600_test.csv", "youtube_id,time_start,time_end,split\n0123456789d,17,27,test\n"),
        ("videos/val/abseiling/0123456789a_000417_000427.mp4", ""),
        ("videos/val/-_123456789_000003_000013.mp4", ""),
        ("videos/val/massaging_persons_head/0123456789c_000000_000010.mkv", ""),
    ]);
    let list = |name: &str, split: &str| {
        let mut kinetics = shipped(name);
        kinetics.expect_classes = None;
        disk.list(&kinetics, split)
    };
    let small = list("kinetics400", "val").unwrap();
    let of_small = [
        ("-_123456789_000003_000013", "riding mule", Some("val/-_123456789_000003_000013.mp4")),
        ("0123456789a_000417_000427", "abseiling", Some("val/abseiling/0123456789a_000417_000427.mp4")),
    ];
    assert_eq!(rows(&small), of_small);
    let large = list("kinetics600", "val").unwrap();
    let there = "val/massaging_persons_head/0123456789c_000000_000010.mkv";
    let of_large = [
        ("0123456789b_000038_000048", "", None),
        ("0123456789c_000000_000010", "massaging person's head", Some(there)),
    ];
    assert_eq!(rows(&large), of_large);
    for name in ["kinetics400", "kinetics600"] {
        let error = list(name, "test").unwrap_err();
        assert!(error.contains("_test.csv: no column \"label\"") && error.contains("a list without labels"), "{error}");
    }
}

/// Of a hundred thousand clips most may be gone: they are looked up in what was listed once.
#[test]
fn a_long_list_of_which_little_is_there_is_read_at_once() {
    let (mut csv, disk) = (String::from(HEADER), Disk::new(&[("videos/a/0123456789a_000000_000010.mp4", "")]));
    for n in 0..100_000 {
        csv += &format!("class {},{n:011},{},{},train\n", n % 600, n % 500, n % 500 + 10);
        if n % 100 == 0 {
            let name = format!("{n:011}_{:06}_{:06}.mp4", n % 500, n % 500 + 10);
            std::fs::write(disk.path("videos/a").join(name), "").unwrap();
        }
    }
    let begun = std::time::Instant::now();
    let listing = disk.kinetics(csv).unwrap();
    let taken = begun.elapsed().as_secs_f64();
    let videos = &listing.splits[0].1;
    assert_eq!((videos.there.len(), videos.missing.len(), listing.unused.len()), (1_000, 99_000, 1));
    // By id, though they no longer fit into one piece of memory.
    let missing: Vec<String> = videos.missing.ids().map(Result::unwrap).collect();
    assert!(missing.is_sorted() && missing.len() == 99_000 && missing[98] == "00000000099_000099_000109");
    assert!(taken < 10.0, "{taken:.1} s");
}

#[test]
fn one_annotation_file_is_for_one_split() {
    let disk = Disk::new(&[("videos/0123456789a_000000_000010.mp4", ""), ("mine.csv", "")]);
    disk.write("mine.csv", format!("{HEADER}yoga,0123456789a,0,10,train\n"));
    let (videos, file) = (disk.path("videos"), disk.path("mine.csv"));
    let place = Place { videos: &videos, annotations: Some(&file), classes: None, stored_classes: None, out: None };
    let kinetics = Description::plain(Layout::Kinetics, "kinetics");
    assert_eq!(list(&kinetics, &place, &["train".into()]).unwrap().splits[0].1.there.len(), 1);
    let error = list(&kinetics, &place, &["train".into(), "val".into()]).unwrap_err().to_string();
    assert!(error.contains("mine.csv: --annotations is one file, but train and val have one each"), "{error}");
    let none = disk.path("none");
    let error =
        list(&kinetics, &Place { annotations: Some(&none), ..place }, &["train".into()]).unwrap_err().to_string();
    assert!(error.contains("none: --annotations names neither a file nor a folder"), "{error}");
}

/// The splits of one folder of shards have the same classes, though one of them has no video of some class.
#[test]
fn a_stored_list_of_classes_decides_the_labels_of_later_splits() {
    let disk = Disk::new(&[("videos/0123456789a_000000_000010.mp4", ""), ("out/classes.txt", "a b\nyoga\nzumba\n")]);
    let videos = disk.path("videos");
    let labels = |class: &str, stored: &str| {
        disk.write("val.csv", format!("{HEADER}{class},0123456789a,0,10,val\n"));
        let file = disk.path("val.csv");
        let stored_classes = Some(disk.path(stored));
        let place = Place { videos: &videos, annotations: Some(&file), classes: None, stored_classes, out: None };
        let listing = list(&Description::plain(Layout::Kinetics, "kinetics"), &place, &["val".into()]);
        listing
            .map(|l| (l.class_names.len(), l.splits[0].1.there.iter().next().unwrap().unwrap().label))
            .map_err(|e| e.to_string())
    };
    assert_eq!(labels("yoga", "out/classes.txt"), Ok((3, 1)));
    assert_eq!(labels("yoga", "out/none.txt"), Ok((1, 0)));
    // Byte for byte: no trimming, no other case.
    let error = labels("Yoga", "out/classes.txt").unwrap_err();
    assert!(
        error.contains("line 2: class \"Yoga\" is not in the list of 3 classes; did you mean \"yoga\"?"),
        "{error}"
    );
    let error = labels("yoga ", "out/classes.txt").unwrap_err();
    assert!(error.contains("class \"yoga \" is not in the list of 3 classes"), "{error}");
    // Folder spelling is for folders.
    let error = labels("a_b", "out/classes.txt").unwrap_err();
    assert!(error.contains("class \"a_b\" is not in the list of 3 classes"), "{error}");
}

/// `datasets/*` as they are shipped, on small imitations of the archives.
fn shipped(name: &str) -> Description {
    Description::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets").join(name)).unwrap()
}

#[test]
fn ucf101_counts_from_one_and_knows_its_trap() {
    let mut ucf = shipped("ucf101");
    ucf.expect_classes = Some(3);
    let disk = Disk::new(&[
        ("lists/classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n"),
        (
            "lists/trainlist01.txt",
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nHandstandPushups/v_HandStandPushups_g08_c01.avi 2\n\
             YoYo/v_YoYo_g08_c01.avi 3\n",
        ),
        ("lists/testlist01.txt", "HandStandPushups/v_HandStandPushups_g01_c02.avi\r\nYoYo/v_YoYo_g01_c01.avi\r\n"),
        ("videos/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", ""),
        ("videos/HandStandPushups/v_HandstandPushups_g08_c01.avi", ""),
        ("videos/HandStandPushups/v_HandStandPushups_g01_c02.avi", ""),
        ("videos/YoYo/v_YoYo_g01_c01.avi", ""),
        ("videos/yoyo/v_yoyo_g08_c01.avi", ""),
    ]);
    let train = disk.list(&ucf, "train1").unwrap();
    assert_eq!(train.class_names, ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]);
    let expected = [
        (
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
            "ApplyEyeMakeup",
            Some("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"),
        ),
        (
            "HandstandPushups/v_HandStandPushups_g08_c01.avi",
            "HandstandPushups",
            Some("HandStandPushups/v_HandstandPushups_g08_c01.avi"),
        ),
        // Only that one class may differ in case.
        ("YoYo/v_YoYo_g08_c01.avi", "", None),
    ];
    assert_eq!(rows(&train), expected);
    let test = disk.list(&ucf, "test1").unwrap();
    assert_eq!(
        rows(&test).iter().map(|row| (row.1, row.2.is_some())).collect::<Vec<_>>(),
        [("HandstandPushups", true), ("YoYo", true)]
    );
    assert!(disk.list(&ucf, "train4").unwrap_err().contains("has no such split; it has test1, test2, test3, train1"));

    disk.write("lists/trainlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 0\n");
    let error = disk.list(&ucf, "train1").unwrap_err();
    assert!(
        error.contains("trainlist01.txt:1: class number 0 is no class in classInd.txt (which counts from 1)"),
        "{error}"
    );
    disk.write("lists/trainlist01.txt", "ApplyEyeMakeup/a.avi 2\n");
    assert!(disk.list(&ucf, "train1").unwrap_err().contains("class number 2 is \"HandstandPushups\""));
    disk.write("lists/trainlist01.txt", "ApplyEyeMakeup/a.avi 1\nApplyEyeMakeup/a.avi 1\n");
    assert!(disk.list(&ucf, "train1").unwrap_err().contains("trainlist01.txt:2: ApplyEyeMakeup/a.avi is listed twice"));
    disk.write("lists/trainlist01.txt", "a.avi\n");
    assert!(disk.list(&ucf, "train1").unwrap_err().contains("\"a.avi\" is not CLASS/video.avi"));
    disk.write("lists/classInd.txt", "0 ApplyEyeMakeup\n1 YoYo\n");
    assert!(disk.list(&ucf, "train1").unwrap_err().contains("is not `1 CLASS`"));
}

#[test]
fn hmdb51_classes_are_its_lists_and_flags_its_splits() {
    let mut hmdb = shipped("hmdb51");
    (hmdb.expect_classes, hmdb.classes) = (Some(2), None);
    let disk = Disk::new(&[
        (
            "lists/brush_hair_test_split1.txt",
            "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \nsmile_a.avi 2 \nb.avi 0 \n",
        ),
        ("lists/smile_test_split1.txt", "#20_Rhythm (x)_smile.avi 1 \r\nb.avi 1 \r\n"),
        ("lists/smile_test_split2.txt", "b.avi 3\n"),
        ("videos/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", ""),
        ("videos/smile/#20_Rhythm (x)_smile.avi", ""),
        ("videos/smile/b.avi", ""),
        ("videos/smile_a.avi", ""),
    ]);
    let train = disk.list(&hmdb, "train1").unwrap();
    assert_eq!(
        rows(&train).iter().map(|r| (r.1, r.2.unwrap())).collect::<Vec<_>>(),
        [
            ("brush_hair", "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi"),
            ("smile", "smile/#20_Rhythm (x)_smile.avi"),
            ("smile", "smile/b.avi"),
        ]
    );
    // The class is the list's, though the video's name says another; a flat folder will do.
    let test = disk.list(&hmdb, "test1").unwrap();
    assert_eq!(rows(&test), [("brush_hair/smile_a.avi", "brush_hair", Some("smile_a.avi"))]);
    let error = disk.list(&hmdb, "train2").unwrap_err();
    assert!(error.contains("smile_test_split2.txt:1: flag 3: it must be 0 (unused), 1 (train) or 2 (test)"), "{error}");
    assert!(disk.list(&hmdb, "train3").unwrap_err().contains("no *_test_split3.txt in this folder"));
    hmdb.expect_classes = Some(51);
    assert!(disk.list(&hmdb, "train1").unwrap_err().contains("2 classes, but hmdb51 has 51: is a file incomplete"));
}

#[test]
fn every_description_here_can_be_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("dataset.toml").is_file() {
            let description = Description::read(&dir).unwrap();
            assert!(dir.join("README.md").is_file(), "{} has no README.md", dir.display());
            assert_eq!(description.name, dir.file_name().unwrap().to_str().unwrap());
            found.push((description.name, description.expect_classes));
        }
    }
    found.sort();
    let expected = [
        ("folders", None),
        ("hmdb51", Some(51)),
        ("kinetics400", Some(400)),
        ("kinetics600", Some(600)),
        ("kinetics700", Some(700)),
        ("ucf101", Some(101)),
    ];
    assert_eq!(found, expected.map(|(name, classes)| (name.to_string(), classes)));
}

#[test]
fn descriptions_that_make_no_sense_are_refused() {
    let disk = Disk::new(&[]);
    let refused = |text: &str| {
        disk.write("dataset.toml", text);
        let error = Description::read(disk.0.path()).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("dataset.toml"), "{error}");
        error.to_string()
    };
    assert!(refused("name = 'x'\nlayout = 'kinetics'\nsplit = 3\n").contains("unknown field `split`"));
    assert!(refused("name = 'x'\nlayout = 'imagenet'\n[splits.train]\n").contains("unknown variant `imagenet`"));
    assert!(refused("name = 'x'\nlayout = 'kinetics'\n[splits]\n").contains("describes no splits"));
    assert!(
        refused("name = 'x'\nlayout = 'kinetics'\n[splits.train]\n").contains("splits.train: annotations is missing")
    );
    let hmdb = "name = 'x'\nlayout = 'hmdb51'\n[splits.train]\n";
    assert!(refused(&format!("{hmdb}annotations = ['a.txt']\nflag = 1\n")).contains("needs one *"));
    assert!(refused(&format!("{hmdb}annotations = ['*.txt']\n")).contains("flag is missing"));
    assert!(
        Description::read(&disk.path("none")).unwrap_err().to_string().contains("none: cannot read this description")
    );
}

/// A list without a header line whose columns the description names; and one list for several splits.
#[test]
fn a_description_can_name_columns_and_subsets() {
    let disk = Disk::new(&[("videos/0123456789a_000000_000010.mp4", ""), ("videos/0123456789b_000000_000010.mp4", "")]);
    disk.write(
        "dataset.toml",
        "name = 'mine'\nlayout = 'kinetics'\ncolumns = ['youtube_id', 'time_start', 'time_end', 'split', 'label']\n\
         [splits.val]\nannotations = ['all.txt']\nsubset = 'validate'\n\
         [splits.other]\nannotations = ['all.txt']\nsubset = 'other'\n",
    );
    disk.write("lists/all.txt", "0123456789a,0,10,train,yoga\n0123456789b,0,10,validate,yoga\n");
    let description = Description::read(&disk.path("dataset.toml")).unwrap();
    let listing = disk.list(&description, "val").unwrap();
    assert_eq!(rows(&listing), [("0123456789b_000000_000010", "yoga", Some("0123456789b_000000_000010.mp4"))]);
    let error = disk.list(&description, "other").unwrap_err();
    assert!(
        error.contains("none of 2 entries is of the split \"other\"; there are [\"train\", \"validate\"]"),
        "{error}"
    );
}

/// Of copies in no class's folder the first counts: folder by folder, as a file browser has them.
#[test]
fn of_copies_the_first_folder_has_the_clip() {
    let name = "0123456789a_000000_000010.mp4";
    let files = ["archery (1)", "archery", "archery-2"].map(|folder| format!("videos/train/{folder}/{name}"));
    let disk = Disk::new(&files.each_ref().map(|file| (file.as_str(), "")));
    let listing = disk.kinetics(format!("{HEADER}yoga,0123456789a,0,10,train\n")).unwrap();
    assert_eq!(rows(&listing)[0].2, Some(format!("train/archery/{name}").as_str()));
    assert_eq!(listing.unused.len(), 2);
}
