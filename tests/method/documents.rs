//! Documents say what is there: links lead somewhere, and every key of a configuration stands with its default.

use std::path::{Path, PathBuf};

use sideways::config::Config;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Markdown file that belongs to the project.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in [".", "docs", "datasets", "slurm", "benches", "tests"] {
        let mut pending = vec![root().join(folder)];
        while let Some(folder_now) = pending.pop() {
            for entry in std::fs::read_dir(&folder_now).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && folder != "." {
                    pending.push(path);
                } else if path.extension().is_some_and(|end| end == "md") {
                    found.push(path);
                }
            }
        }
    }
    assert!(found.len() > 15, "{found:?}");
    found
}

/// Where the links of a Markdown text lead, but for those on the web and within the page.
fn links(text: &str) -> Vec<String> {
    let targets =
        text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_string());
    targets.filter(|target| !target.starts_with("http") && !target.starts_with('#')).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut count = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in links(&text) {
            let file = link.split('#').next().unwrap_or(&link);
            assert!(document.with_file_name(file).exists(), "{}: {link}", document.display());
            count += 1;
        }
    }
    assert!(count > 20, "{count} links");
    // Every page of the book is in its contents.
    let contents = std::fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
    for page in documents().iter().filter(|path| path.parent() == Some(&root().join("docs"))) {
        let name = page.file_name().unwrap().to_string_lossy();
        assert!(name == "SUMMARY.md" || contents.contains(&format!("({name})")), "{name} is not in docs/SUMMARY.md");
    }
}

#[test]
fn every_key_is_documented_with_its_default() {
    let page = std::fs::read_to_string(root().join("docs/configuration.md")).unwrap();
    let blocks: Vec<&str> = page.split("```toml\n").skip(1).filter_map(|block| block.split("```").next()).collect();
    assert_eq!(blocks.len(), 2, "an example, and the further keys");
    // The fields of each section, as the code has them.
    for section in ["data", "model", "train", "run"] {
        let code = std::fs::read_to_string(root().join(format!("src/config/{section}.rs"))).unwrap();
        let fields = code.split_once("Config {").unwrap().1.split_once("\n}").unwrap().0;
        for field in fields.lines().filter_map(|line| line.trim().strip_prefix("pub ")) {
            let key = field.split(':').next().unwrap();
            // `layers` and `cuts` stand in a comment, in place of `preset` and `modules`; so does `batches`.
            let shown = |text: &str| text.contains(&format!("\n{key} = ")) || text.contains(&format!("# {key} = "));
            let beside = |text: &str| text.contains(&format!("or {key} = "));
            assert!(blocks.iter().any(|text| shown(text) || beside(text)), "{section}.{key}");
        }
    }
    // The further keys have the values that they have where nobody sets them.
    let default: toml::Table = Config::default().to_toml().unwrap().parse().unwrap();
    let shown: toml::Table = blocks[1].parse().unwrap();
    for (section, keys) in &shown {
        for (key, value) in keys.as_table().unwrap() {
            assert_eq!(Some(value), default[section].get(key), "{section}.{key}");
        }
    }
    // And the example can be read.
    let example: toml::Table = blocks[0].parse().unwrap();
    assert_eq!(example.len(), 4);
}

/// The drawing of what learns has the numbers of the table, from the same runs.
#[test]
fn the_drawing_of_what_learns_shows_the_tables_numbers() {
    let table = std::fs::read_to_string(root().join("datasets/motion/README.md")).unwrap();
    let by_seed = table.lines().find_map(|line| line.strip_prefix("| by seed | ")).unwrap();
    let mut shown: Vec<&str> = by_seed.trim_end_matches(" |").split(" | ").collect();
    let values = std::fs::read_to_string(root().join("docs/learning.csv")).unwrap();
    let mut drawn: Vec<(&str, String)> = Vec::new();
    for line in values.lines().filter(|line| !line.starts_with('#')).skip(1) {
        let [rule, _, top1] = line.split(',').collect::<Vec<_>>()[..] else { panic!("{line}") };
        match drawn.last_mut().filter(|(last, _)| *last == rule) {
            Some((_, list)) => *list += &format!(", {top1}"),
            None => drawn.push((rule, top1.into())),
        }
    }
    let mut drawn: Vec<&str> = drawn.iter().map(|(_, list)| list.as_str()).collect();
    shown.sort_unstable();
    drawn.sort_unstable();
    assert_eq!(shown, drawn);
}
