//! A configuration from its file, overrides, and back to text.

use std::path::Path;

use super::Config;
use crate::{Error, Result};

impl Config {
    /// Reads the configuration at `path` and applies `overrides` (`section.key=value`, value in TOML or a bare word).
    ///
    /// # Errors
    /// [`Error::Input`] naming the file, line and key, with a suggestion for a mistyped key.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            let why = match e.kind() {
                std::io::ErrorKind::InvalidData => "not a text file; a configuration is a TOML file".to_string(),
                _ => e.to_string(),
            };
            Error::input(format!("configuration {}: {why}", path.display()))
        })?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// [`Config::load`] from text; `source` names it in errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, source: &str, overrides: &[String]) -> Result<Self> {
        // The file alone first: its errors carry line numbers.
        toml::from_str::<Config>(text).map_err(|e| Error::input(format!("{source}: {}", with_suggestion(&e))))?;
        let mut table: toml::Table = toml::from_str(text).map_err(|e| Error::input(format!("{source}: {e}")))?;
        for setting in overrides {
            apply(&mut table, setting)?;
        }
        // `clips` counts where both are given: epochs asked for here replace the file's clips.
        let given = |key: &str| overrides.iter().any(|s| s.split('=').next().is_some_and(|k| k.trim() == key));
        if given("train.epochs")
            && !given("train.clips")
            && let Some(train) = table.get_mut("train").and_then(toml::Value::as_table_mut)
        {
            train.remove("clips");
        }
        table.try_into::<Config>().map_err(|e| {
            let list = overrides.iter().map(|s| format!("--set {s}")).collect::<Vec<_>>().join(" ");
            Error::input(format!("{source} with {list}: {}", with_suggestion(&e)))
        })
    }

    /// The configuration as TOML, every default written out.
    ///
    /// # Errors
    /// [`Error::Run`] if it cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Run(format!("writing the configuration as TOML: {e}")))
    }
}

/// Sets `section.key=value` in a TOML table. A value that is not TOML is taken as a string.
fn apply(table: &mut toml::Table, setting: &str) -> Result<()> {
    let (key, value) = setting.split_once('=').ok_or_else(|| {
        Error::input(format!("--set {setting}: expected section.key=value, for instance --set train.epochs=2"))
    })?;
    let value = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().unwrap_or_default();
    if last.is_empty() {
        return Err(Error::input(format!("--set {setting}: the key is empty")));
    }
    let mut at = table;
    for part in parts {
        at = at
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| Error::input(format!("--set {setting}: {part} is a value, not a section")))?;
    }
    at.insert(last.to_string(), value);
    Ok(())
}

/// Serde's words for what it expected, and words that users know.
const PLAIN: [(&str, &str); 13] = [
    ("expected u64", "expected a whole number, 0 or more"),
    ("expected usize", "expected a whole number, 0 or more"),
    ("expected u32", "expected a whole number, 0 or more"),
    ("expected f64", "expected a number"),
    ("expected f32", "expected a number"),
    ("expected a sequence", "expected a list in [ ]"),
    ("data did not match any variant of untagged enum UpdateEvery", "expected \"clip\" or a number of steps"),
    ("data did not match any variant of untagged enum Globs", "expected a glob of shards or a list of them"),
    ("data did not match any variant of untagged enum Delay", "expected \"aligned\" or a number of ticks"),
    ("data did not match any variant of untagged enum SkipEdge", "expected [from, to] or { from, to, delay }"),
    ("expected internally tagged enum OptimizerSpec", "expected a table, such as { kind = \"sgd\", lr = 0.1 }"),
    ("expected internally tagged enum ScheduleSpec", "expected a table, such as { kind = \"cosine\" }"),
    ("expected struct SkipConfig", "expected a table, such as { spans = [2] }"),
];

/// A TOML error with "did you mean" where an unknown key looks like a known one.
fn with_suggestion(error: &toml::de::Error) -> String {
    let text = error.to_string().trim_end().to_string();
    let text = PLAIN.iter().fold(text, |text, (serde, plain)| text.replace(serde, plain));
    let mut quoted = error.message().split('`').skip(1).step_by(2);
    let unknown = error.message().contains("unknown field") || error.message().contains("unknown variant");
    if let (true, Some(given)) = (unknown, quoted.next())
        && let Some(best) =
            quoted.max_by(|a, b| strsim::jaro_winkler(given, a).total_cmp(&strsim::jaro_winkler(given, b)))
        && strsim::jaro_winkler(given, best) > 0.75
    {
        return format!("{text}\ndid you mean `{best}`?");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[model]\npreset = \"motion-small\"\nskip = { spans = [2], delay = \"aligned\" }\n";

    fn refused(text: &str, overrides: &[&str], words: &[&str]) {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        let error = Config::parse(text, "c.toml", &overrides).and_then(|c| c.validate()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        for word in words {
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn defaults_round_trip() {
        let config = Config::parse(SMALL, "c.toml", &[]).unwrap();
        config.validate().unwrap();
        assert_eq!(Config::parse(&config.to_toml().unwrap(), "again", &[]).unwrap(), config);
    }

    #[test]
    fn overrides_take_toml_and_bare_words() {
        let sets = ["train.epochs=2", "model.preset=vgg8", "run.dir=runs/x", "data.train=['a','b']"].map(String::from);
        let config = Config::parse(SMALL, "c.toml", &sets).unwrap();
        assert_eq!(config.train.epochs, 2);
        assert_eq!(config.model.preset.as_deref(), Some("vgg8"));
        assert_eq!(config.data.train.list(), ["a", "b"]);
    }

    #[test]
    fn unknown_keys_name_line_and_suggestion() {
        refused("[train]\nepocs = 3\n", &[], &["c.toml", "line 2", "did you mean `epochs`"]);
        refused(SMALL, &["train.optimiser.lr=3"], &["--set", "did you mean `optimizer`"]);
        refused(SMALL, &["train.boundary=flwo"], &["did you mean `flow`"]);
    }

    #[test]
    fn epochs_asked_for_replace_the_files_clips() {
        let text = format!("{SMALL}[train]\nclips = 9\n");
        let clips = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::parse(&text, "c.toml", &sets).unwrap().train.clips
        };
        assert_eq!(clips(&[]), Some(9));
        assert_eq!(clips(&["train.epochs=2"]), None);
        assert_eq!(clips(&["train.epochs=2", "train.clips=3"]), Some(3));
    }

    #[test]
    fn wrong_types_are_told_in_plain_words() {
        refused(SMALL, &["train.clips=abc"], &["in `train.clips`", "\"abc\"", "expected a whole number"]);
        refused(SMALL, &["data.batch=-1"], &["in `data.batch`", "expected a whole number, 0 or more"]);
        refused(SMALL, &["train.clip_norm=much"], &["in `train.clip_norm`", "expected a number"]);
        refused(SMALL, &["train.update_every=day"], &["expected \"clip\" or a number of steps"]);
        refused(SMALL, &["data.train=3"], &["in `data.train`", "expected a glob of shards"]);
        refused(SMALL, &["model.skip.delay=true"], &["expected \"aligned\" or a number"]);
        refused(SMALL, &["model.skip.edges=[2]"], &["expected [from, to] or { from, to, delay }"]);
        refused(SMALL, &["train.optimizer=adam"], &["in `train.optimizer`", "{ kind = \"sgd\", lr = 0.1 }"]);
        refused(SMALL, &["train.schedule=cosine"], &["in `train.schedule`", "{ kind = \"cosine\" }"]);
        refused(SMALL, &["model.skip=3"], &["in `model.skip`", "{ spans = [2] }"]);
        refused(SMALL, &["model.skip.spans=2"], &["expected a list"]);
    }

    #[test]
    fn a_file_that_is_no_text_is_no_configuration() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0x89, b'H', b'D', b'F', 0xff, 0xfe]).unwrap();
        let error = Config::load(file.path(), &[]).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("a configuration is a TOML file"), "{error}");
    }

    #[test]
    fn impossible_values_are_refused() {
        refused("", &[], &["no network"]);
        refused(SMALL, &["data.batch=0"], &["data.batch = 0"]);
        refused(SMALL, &["train.rule=sideways"], &["model.skip"]);
        refused(SMALL, &["model.modules=3", "model.cuts=[1]"], &["makes 2 modules"]);
        refused(SMALL, &["train.update_every=0"], &["update_every = 0"]);
        for gpus in ["precision=bf16", "exchange=peer", "wire=bf16"] {
            refused(SMALL, &[&format!("run.{gpus}")], &["run.device = \"cuda\""]);
        }
        refused(SMALL, &["train.clip_norm=-1"], &["clip_norm"]);
    }

    #[test]
    fn aligned_delay_is_the_span() {
        let config = Config::parse(SMALL, "c.toml", &[]).unwrap();
        let graph = config.graph(4).unwrap();
        assert!(graph.edges().iter().filter(|e| !e.is_main()).all(|e| e.delay == e.span()));
    }
}
