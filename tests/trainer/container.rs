//! Batch scripts that run the program from an image: what srun is asked for, without Slurm and without apptainer.

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
