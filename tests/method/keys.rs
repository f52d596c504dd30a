//! `docs/keys.md` is made of the code's own comments: every key of a configuration with its choices and its default.
//! `SIDEWAYS_WRITE_DOCS=1 cargo test --release --test method keys` writes it anew.

use std::fmt::Write;
use std::path::Path;

use sideways::config::Config;

/// A field or variant: its comment, its attributes, its declaration.
struct Item {
    comment: String,
    attributes: String,
    code: String,
}

fn source(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(path)).unwrap()
}

/// What stands in the braces behind `head`, and the attributes before it.
fn block<'a>(text: &'a str, head: &str) -> (&'a str, &'a str) {
    let (before, after) = text.split_once(head).unwrap_or_else(|| panic!("{head} is not there"));
    let attributes = &before[before.rfind("\n\n").unwrap_or(0)..];
    (after.split_once("\n}").unwrap().0, attributes)
}

/// The items `depth` levels deep in a block.
fn items(block: &str, depth: usize) -> Vec<Item> {
    let indent = "    ".repeat(depth);
    let mut found = Vec::new();
    let (mut comment, mut attributes) = (String::new(), String::new());
    for line in block.lines() {
        let Some(line) = line.strip_prefix(&indent).filter(|line| !line.starts_with(' ')) else { continue };
        if let Some(text) = line.strip_prefix("///") {
            comment += text;
        } else if line.starts_with("#[") {
            attributes += line;
        } else if !line.is_empty() && !line.starts_with('}') {
            let code = line.trim_start_matches("pub ").to_string();
            found.push(Item {
                comment: std::mem::take(&mut comment),
                attributes: std::mem::take(&mut attributes),
                code,
            });
        }
    }
    found
}

/// As a cell of a table: no links into the code.
fn cell(comment: &str) -> String {
    comment.trim().replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

/// A variant's name as a configuration has it.
fn named(variant: &Item, attributes: &str) -> String {
    if let Some((_, name)) = variant.attributes.split_once("rename = \"") {
        return name.split('"').next().unwrap().to_string();
    }
    let name = variant.code.trim_end_matches([',', '{', ' ']);
    let kebab = attributes.contains("kebab-case");
    let mut text = String::new();
    for (at, letter) in name.char_indices() {
        if letter.is_uppercase() && at > 0 && kebab {
            text.push('-');
        }
        text.extend(letter.to_lowercase());
    }
    text
}

/// The choices of a type, where it is one of these.
const CHOICES: [(&str, &str); 13] = [
    ("Rule", "method/rule.rs"),
    ("Stash", "method/rule.rs"),
    ("Boundary", "method/schedule/mod.rs"),
    ("Task", "nn/head.rs"),
    ("PixelLoss", "nn/loss.rs"),
    ("Fuse", "nn/module.rs"),
    ("DeviceChoice", "config/run.rs"),
    ("Wire", "config/run.rs"),
    ("OnCheckpointError", "config/run.rs"),
    ("OnNonfinite", "config/run.rs"),
    ("Precision", "backend/mod.rs"),
    ("Exchange", "comm/exchange/mod.rs"),
    ("NamedPeriod", "config/train.rs"),
];

fn choices(kind: &str) -> Option<String> {
    let (name, path) = CHOICES.iter().find(|(name, _)| *name == kind)?;
    let text = source(path);
    let (variants, attributes) = block(&text, &format!("pub enum {name} {{\n"));
    let variants = items(variants, 1);
    let each =
        variants.iter().map(|v| format!("`\"{}\"`: {}", named(v, attributes), cell(&v.comment).trim_end_matches('.')));
    Some(each.collect::<Vec<_>>().join("; "))
}

/// A table of the keys of a struct. `set` are the values that they have where nobody sets them.
fn keys(page: &mut String, section: &str, path: &str, name: &str, set: Option<&toml::Value>) {
    let text = source(path);
    let (fields, _) = block(&text, &format!("pub struct {name} {{\n"));
    let _ = writeln!(page, "\n## `[{section}]`\n\n| key | default | is |\n|---|---|---|");
    for item in items(fields, 1) {
        let (key, kind) = item.code.trim_end_matches(',').split_once(": ").unwrap();
        let default = set.and_then(|table| table.get(key)).map_or("–".into(), |value| format!("`{value}`"));
        let mut is = cell(&item.comment);
        if let Some(choices) = choices(kind) {
            let _ = write!(is, " {choices}.");
        }
        let _ = writeln!(page, "| `{key}` | {} | {is} |", default.replace('|', "\\|"));
    }
}

/// A table a variant of a tagged enum.
fn kinds(page: &mut String, section: &str, path: &str, name: &str) {
    let text = source(path);
    let (variants, attributes) = block(&text, &format!("pub enum {name} {{\n"));
    let _ = writeln!(page, "\n## `[{section}]`\n\n| kind | is | keys |\n|---|---|---|");
    for variant in items(variants, 1) {
        let inner = variants.split_once(&format!("    {}\n", variant.code)).map_or("", |(_, rest)| rest);
        let inner = if variant.code.ends_with('{') { inner.split_once("\n    }").unwrap().0 } else { "" };
        let fields = items(inner, 2).into_iter().map(|field| {
            let key = field.code.split(':').next().unwrap().to_string();
            format!("`{key}`: {}", cell(&field.comment).trim_end_matches('.'))
        });
        let fields: Vec<String> = fields.collect();
        let _ = writeln!(
            page,
            "| `\"{}\"` | {} | {} |",
            named(&variant, attributes),
            cell(&variant.comment),
            if fields.is_empty() { "–".into() } else { fields.join("; ") }
        );
    }
}

#[test]
fn the_page_of_keys_is_what_the_code_says() {
    let set: toml::Value = Config::default().to_toml().unwrap().parse::<toml::Table>().unwrap().into();
    let mut page = String::from(
        "# Every key\n\nMade of the code's comments (`tests/method/keys.rs`); [Configuration](configuration.md) has an example, and what belongs \
         together.\nA key without a default is absent where nobody sets it, or a list that is empty.\n",
    );
    keys(&mut page, "data", "config/data.rs", "DataConfig", set.get("data"));
    keys(&mut page, "model", "config/model.rs", "ModelConfig", set.get("model"));
    keys(&mut page, "model.skip", "config/model.rs", "SkipConfig", None);
    kinds(&mut page, "model.layers", "nn/spec.rs", "LayerSpec");
    keys(&mut page, "train", "config/train.rs", "TrainConfig", set.get("train"));
    kinds(&mut page, "train.optimizer", "nn/optim/spec.rs", "OptimizerSpec");
    kinds(&mut page, "train.lr_schedule", "nn/optim/rate.rs", "LrSchedule");
    keys(&mut page, "run", "config/run.rs", "RunConfig", set.get("run"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/keys.md");
    if std::env::var_os("SIDEWAYS_WRITE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(there == page, "docs/keys.md is not what the code says: SIDEWAYS_WRITE_DOCS=1 writes it anew");
    assert!(page.lines().filter(|line| line.starts_with("| `")).count() > 80, "{page}");
}
