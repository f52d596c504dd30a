//! The house: which room of `src` may use which, read from the code; and where CUDA may be seen.

use std::path::{Path, PathBuf};

/// Each room with what it may use beside `error`. A room uses only rooms above it, so there are no cycles.
const ROOMS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("sys", &[]),
    ("method", &[]),
    ("backend::cpu", &[]),
    ("nn", &["backend::cpu"]),
    ("backend", &["backend::cpu", "method", "nn"]),
    ("comm", &["backend", "sys"]),
    ("data", &["backend::cpu", "sys"]),
    ("metrics", &["comm", "nn", "sys"]),
    ("tensorboard", &["sys"]),
    ("config", &["method", "nn", "backend", "comm", "data", "sys"]),
    ("network", &["config", "method", "nn"]),
    ("checkpoint", &["config", "sys"]),
    ("torch", &["checkpoint", "network", "config", "method", "nn", "backend", "backend::cpu", "sys"]),
    ("setup", &["config", "network", "method", "nn", "backend", "comm", "data", "metrics", "sys"]),
    (
        "pipeline",
        &[
            "setup",
            "network",
            "checkpoint",
            "config",
            "data",
            "metrics",
            "method",
            "nn",
            "backend",
            "backend::cpu",
            "comm",
            "sys",
            "torch",
        ],
    ),
    ("plan", &["setup", "network", "checkpoint", "config", "method", "nn", "backend", "backend::cpu", "comm", "sys"]),
    ("study", &["plan", "setup", "network", "config", "method", "data", "sys"]),
    ("report", &["study", "plan", "checkpoint", "config", "comm", "tensorboard", "metrics", "nn", "sys"]),
    (
        "trainer",
        &[
            "pipeline",
            "plan",
            "setup",
            "checkpoint",
            "config",
            "tensorboard",
            "data",
            "metrics",
            "nn",
            "backend",
            "comm",
            "sys",
            "torch",
        ],
    ),
    (
        "cli",
        &[
            "trainer",
            "report",
            "study",
            "pipeline",
            "plan",
            "setup",
            "network",
            "checkpoint",
            "config",
            "data",
            "metrics",
            "method",
            "nn",
            "backend",
            "backend::cpu",
            "comm",
            "sys",
            "torch",
        ],
    ),
];

/// All source files, as paths below `src`, with their code: no comments.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                files.push((path.strip_prefix(&root).unwrap().to_path_buf(), code.join("\n")));
            }
        }
    }
    assert!(files.len() > 150, "{} files", files.len());
    files
}

/// The room of a path of names below the crate.
fn room<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<String> {
    let first = names.next()?;
    let room = match (first, names.next()) {
        ("backend", Some("cpu")) => "backend::cpu",
        ("Error" | "Result", _) => "error",
        (first, _) => first,
    };
    ROOMS.iter().any(|(name, _)| *name == room).then(|| room.to_string())
}

/// The paths that code names below the crate's root, those in braces one by one.
fn paths_from_root(code: &str, depth: usize) -> Vec<String> {
    let up = "super::".repeat(depth);
    let mut paths = Vec::new();
    for start in ["crate::", up.as_str()] {
        for (at, _) in code.match_indices(start) {
            let rest = &code[at + start.len()..];
            match rest.strip_prefix('{') {
                None => paths.push(rest.to_string()),
                // As far as the brace that closes it; names in inner braces are of inner modules.
                Some(list) => {
                    let (mut level, mut item) = (0, String::new());
                    for c in list.chars() {
                        level += i32::from(c == '{') - i32::from(c == '}');
                        match c {
                            ',' if level == 0 => paths.push(std::mem::take(&mut item)),
                            '}' if level < 0 => break,
                            _ if level == 0 && !c.is_whitespace() => item.push(c),
                            _ => {}
                        }
                    }
                    paths.push(item);
                }
            }
        }
    }
    paths
}

fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split("::").map(|name| name.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default())
}

#[test]
fn rooms_use_only_what_they_may() {
    for (n, (room, may)) in ROOMS.iter().enumerate() {
        let above: Vec<&str> = ROOMS[..n].iter().map(|(name, _)| *name).collect();
        assert!(may.iter().all(|used| above.contains(used)), "{room} uses a room that is not above it in the table");
    }
    let (mut found, mut wrong) = (Vec::new(), Vec::new());
    for (path, code) in sources() {
        let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs")).collect();
        let Some(own) = room(parts.iter().copied()) else {
            assert!(matches!(parts[..], ["lib"] | ["main"]), "{} is in no room of the table", path.display());
            continue;
        };
        let depth = parts.iter().filter(|part| **part != "mod").count();
        for used in paths_from_root(&code, depth).iter().filter_map(|path| room(names(path))) {
            let (_, may) = ROOMS.iter().find(|(name, _)| *name == own).unwrap();
            found.push((own.clone(), used.clone()));
            if used != own && used != "error" && !may.contains(&used.as_str()) {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    let unused = ROOMS.iter().flat_map(|(room, may)| may.iter().map(|used| (room.to_string(), used.to_string())));
    let unused: Vec<_> = unused.filter(|pair| !found.contains(pair)).collect();
    assert!(unused.is_empty(), "the table allows what nobody uses: {unused:?}");
    wrong.sort();
    wrong.dedup();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Whoever computes or sends does not ask whether there is CUDA: a stub stands in where it is left out.
#[test]
fn cuda_is_seen_by_backend_and_comm_alone() {
    let seen: Vec<String> = sources()
        .into_iter()
        .filter(|(_, code)| code.contains("feature = \"cuda\""))
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert!(!seen.is_empty());
    assert!(seen.iter().all(|path| path.starts_with("backend/") || path.starts_with("comm/")), "{seen:?}");
}

#[test]
fn uses_are_found() {
    let code = "use crate::{Error, comm::World};\nuse crate::backend::cpu::pool;\nlet x = super::super::plan::cut();";
    let found: Vec<_> = paths_from_root(code, 2).iter().filter_map(|path| room(names(path))).collect();
    assert_eq!(found, ["error", "comm", "backend::cpu", "plan"]);
}

/// Files are read whole by `sys::files`, which does not wait for a pipe that nobody writes to.
#[test]
fn files_are_read_where_what_is_no_file_is_refused() {
    for (path, code) in sources() {
        let code = code.split("#[cfg(test)]").next().unwrap();
        let reads = ["fs::read(", "fs::read_to_string("].iter().any(|call| code.contains(call));
        assert!(!reads || path.starts_with("sys"), "{}: use sys::files", path.display());
    }
}
