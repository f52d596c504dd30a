//! Batch scripts that run the program from an image: what srun is asked for, without Slurm and without apptainer. The image's
//! recipes: that they agree with each other and with the Makefile.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// What `start_ranks` hands to srun, a word a line, with these variables; its code and what it printed on stderr.
fn started(variables: &[(&str, &str)]) -> (Option<i32>, Vec<String>, String) {
    let script = "set -uo pipefail; source slurm/site.sh; source slurm/ranks.sh || exit 2
        srun() { printf '%s\\n' \"$@\"; }
        start_ranks --distribution=block:block \"${PROGRAM[@]}\" train 'my config.toml'";
    let output = Command::new("bash")
        .args(["-c", script])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .env_remove("SIDEWAYS_CONTAINER")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let words = String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect();
    (output.status.code(), words, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn ranks_start_from_an_image_where_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("my image.sif");
    std::fs::write(&image, "").unwrap();
    let image = image.to_str().unwrap();
    let (code, plain, _) = started(&[("SIDEWAYS", "bin/side ways")]);
    assert_eq!((code, &plain[3..]), (Some(0), &["bin/side ways", "train", "my config.toml"].map(String::from)[..]));
    let (code, words, _) = started(&[("SIDEWAYS_CONTAINER", image), ("APPTAINER_OPTIONS", "--nv --cleanenv")]);
    let here = env!("CARGO_MANIFEST_DIR");
    let expected =
        ["apptainer", "exec", "--bind", here, "--nv", "--cleanenv", image, "sideways", "train", "my config.toml"];
    assert_eq!((code, &words[3..]), (Some(0), &expected.map(String::from)[..]));
    let (code, words, said) = started(&[("SIDEWAYS_CONTAINER", "nowhere.sif")]);
    assert!(code == Some(2) && words.is_empty() && said.contains("nowhere.sif: no such image"), "{words:?} {said}");
}

/// Slurm's signals end the process that mounts an image file where apptainer is not setuid root: that is said before ranks start.
#[test]
fn an_image_file_that_signals_would_take_away_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let write = |path: &Path, text: &str, mode: u32| {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    let starter = at("apptainer/bin/starter-suid");
    for folder in ["bin", "apptainer/bin", "unpacked"] {
        std::fs::create_dir_all(at(folder)).unwrap();
    }
    write(&at("bin/apptainer"), &format!("#!/bin/sh\necho LIBEXECDIR={}\n", dir.path().display()), 0o755);
    write(&at("bin/id"), "#!/bin/sh\necho 1000\n", 0o755);
    std::fs::write(at("image.sif"), "").unwrap();
    let path = format!("{}:{}", at("bin").display(), std::env::var("PATH").unwrap());
    let said = |image: &str| {
        let image = at(image);
        let (code, words, said) = started(&[("PATH", &path), ("SIDEWAYS_CONTAINER", image.to_str().unwrap())]);
        assert!(code == Some(0) && words.len() > 3, "{words:?} {said}");
        said
    };
    let advice = format!("apptainer build --sandbox FOLDER {}", at("image.sif").display());
    assert!(said("image.sif").contains(&advice), "{}", said("image.sif"));
    assert_eq!(said("unpacked"), "");
    write(&starter, "", 0o755);
    assert!(said("image.sif").contains(&advice));
    write(&starter, "", 0o4755);
    assert_eq!(said("image.sif"), "");
}

/// A file of the checkout.
fn file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The words behind `start` in the line of `text` that begins with it.
fn behind<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    let mut found = text.lines().filter_map(|line| line.trim().strip_prefix(start));
    let words = found.next().unwrap_or_else(|| panic!("no line begins with {start:?}"));
    assert!(found.next().is_none(), "several lines begin with {start:?}");
    words.split_whitespace().filter(|&word| word != ";;").collect()
}

#[test]
fn an_image_has_the_packages_of_the_makefile() {
    let (makefile, install) = (file("Makefile"), file("slurm/container/install.sh"));
    let (build, run) = (behind(&install, "build) packages "), behind(&install, "run) packages "));
    // Tests alone look into shards with HDF5's tools.
    let wanted = behind(&makefile, "PACKAGES := ").into_iter().filter(|&package| package != "hdf5-tools");
    let missing: Vec<_> = wanted.filter(|package| !build.contains(package) && !run.contains(package)).collect();
    assert!(missing.is_empty(), "slurm/container/install.sh installs no {missing:?}");
    let named = file("docs/install.md");
    let unnamed: Vec<_> =
        behind(&makefile, "PACKAGES := ").into_iter().filter(|package| !named.contains(package)).collect();
    assert!(unnamed.is_empty(), "docs/install.md does not name {unnamed:?}");
}

#[test]
fn recipes_of_images_agree() {
    let (docker, apptainer) = (file("slurm/container/Dockerfile"), file("slurm/container/sideways.def"));
    let (of_docker, of_apptainer) = (behind(&docker, "ARG RUST="), behind(&apptainer, "RUST="));
    assert_eq!(of_docker, of_apptainer, "versions of Rust");
    let minor = |version: &str| version.split('.').nth(1).unwrap().parse::<u32>().unwrap();
    let least = behind(&file("Cargo.toml"), "rust-version = ")[0].trim_matches('"').to_string();
    assert!(minor(of_docker[0]) >= minor(&least), "{of_docker:?} is older than Cargo.toml's {least}");

    let copied =
        docker.lines().filter_map(|line| line.strip_prefix("COPY ")).filter(|line| !line.starts_with("--from="));
    let copied: BTreeSet<_> = copied.flat_map(|line| line.rsplit_once(' ').unwrap().0.split(' ')).collect();
    let ignored = file(".dockerignore");
    assert!(ignored.lines().any(|line| line == "*"), "{ignored}");
    assert_eq!(ignored.lines().filter_map(|line| line.strip_prefix('!')).collect::<BTreeSet<_>>(), copied);
    let mut taken = BTreeSet::new();
    let mut here = false;
    for line in apptainer.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            [word, ..] if word.starts_with('%') => here = line == "%files",
            [from, _] if here => _ = taken.insert(from),
            _ => {}
        }
    }
    assert_eq!(taken, copied);
    for path in &copied {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists(), "{path}");
    }
}
