//! A configuration from its file, overrides, and back to text.

use std::path::Path;

use super::Config;
use crate::sys::files::read_text;
use crate::{Error, Result};

impl Config {
    /// Reads the configuration at `path` and applies `overrides` (`section.key=value`, value in TOML or a bare word).
    ///
    /// # Errors
    /// [`Error::Input`] naming the file, line and key, with a suggestion for a mistyped key.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = read_text(path).map_err(|e| {
            let why = match e.kind() {
                std::io::ErrorKind::InvalidData => "not a text file; a configuration is a TOML file".to_string(),
                _ => e.to_string(),
            };
            Error::input(format!("configuration {}: {why}", path.display()))
        })?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// The configuration in a checkpoint's manifest, with `overrides`; `source` names it in errors. What later became a key, or got
    /// another default, is as it was when the checkpoint was written.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn of_manifest(text: &str, source: &str, overrides: &[String]) -> Result<Self> {
        let mut table: toml::Table = toml::from_str(text).map_err(|e| Error::input(format!("{source}: {e}")))?;
        if let Some(train) = table.get_mut("train").and_then(toml::Value::as_table_mut) {
            train.entry("clip_norm").or_insert("none".into());
            train.entry("lr_depth").or_insert(1.0.into());
        }
        Self::parse(&table.to_string(), source, overrides)
    }

    /// [`Config::load`] from text; `source` names it in errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, source: &str, overrides: &[String]) -> Result<Self> {
        // The file alone first: its errors carry line numbers.
        toml::from_str::<Config>(text).map_err(|e| Error::input(format!("{source}: {}", with_suggestion(&e))))?;
        let mut table: toml::Table = toml::from_str(text).map_err(|e| Error::input(format!("{source}: {e}")))?;
        if let Some(train) = table.get_mut("train").and_then(toml::Value::as_table_mut) {
            for (old, new) in FORMER_NAMES {
                train.remove(old).map(|value| train.insert(new.to_string(), value));
            }
        }
        let keys = overrides.iter().map(|setting| apply(&mut table, setting)).collect::<Result<Vec<Vec<&str>>>>()?;
        let given = |key: &str| keys.iter().any(|path| path.starts_with(&["train", key]));
        if let Some((old, new)) = FORMER_NAMES.iter().find(|(old, new)| given(old) && given(new)) {
            return Err(Error::input(format!(
                "--set train.{old} is the former name of train.{new}: keep one of the two"
            )));
        }
        // `batches` counts where both are given: epochs asked for here replace the file's batches.
        if given("epochs")
            && !given("batches")
            && !given("clips")
            && let Some(train) = table.get_mut("train").and_then(toml::Value::as_table_mut)
        {
            train.remove("batches");
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

/// Keys of `[train]` that once had another name, which is still read.
const FORMER_NAMES: [(&str, &str); 2] = [("clips", "batches"), ("schedule", "lr_schedule")];

/// Sets `section.key=value` in a TOML table and returns the key's parts as written. A value that is not TOML is taken as a
/// string.
fn apply<'a>(table: &mut toml::Table, setting: &'a str) -> Result<Vec<&'a str>> {
    let (key, value) = setting.split_once('=').ok_or_else(|| {
        Error::input(format!("--set {setting}: expected section.key=value, for instance --set train.epochs=2"))
    })?;
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok().and_then(|mut t| t.remove("v"));
    let digits = value.trim().trim_start_matches(['+', '-']).replace('_', "");
    if parsed.is_none() && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Error::input(format!(
            "--set {setting}: a whole number is {} to {} (and begins with no 0)",
            i64::MIN,
            i64::MAX
        )));
    }
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_string()));
    let written: Vec<&str> = key.trim().split('.').collect();
    if written.last().is_none_or(|last| last.is_empty()) {
        return Err(Error::input(format!("--set {setting}: the key is empty")));
    }
    let mut path = written.clone();
    if let ["train", key, ..] = &mut path[..]
        && let Some((_, new)) = FORMER_NAMES.iter().find(|(old, _)| old == key)
    {
        *key = new;
    }
    let last = path.pop().unwrap_or_default();
    let mut at = table;
    for part in path {
        at = at
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| Error::input(format!("--set {setting}: {part} is a value, not a section")))?;
    }
    at.insert(last.to_string(), value);
    Ok(written)
}

/// Serde's words for what it expected, and words that users know.
const PLAIN: [(&str, &str); 10] = [
    ("expected u64", "expected a whole number, 0 or more"),
    ("expected usize", "expected a whole number, 0 or more"),
    ("expected u32", "expected a whole number, 0 or more"),
    ("expected f64", "expected a number"),
    ("expected f32", "expected a number"),
    ("u64 value was too large", "a whole number is at most 9223372036854775807"),
    ("i64 value was too large", "a whole number is at most 9223372036854775807"),
    ("expected a sequence", "expected a list in [ ]"),
    ("duplicate field `batches`", "`clips` is the former name of `batches`: keep one of the two"),
    ("duplicate field `lr_schedule`", "`schedule` is the former name of `lr_schedule`: keep one of the two"),
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

    fn train(text: &str, sets: &[&str]) -> crate::config::TrainConfig {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::parse(&format!("{SMALL}[train]\n{text}"), "c.toml", &sets).unwrap().train
    }

    #[test]
    fn epochs_asked_for_replace_the_files_batches() {
        for name in ["batches", "clips"] {
            let text = format!("{name} = 9\n");
            assert_eq!(train(&text, &[]).batches, Some(9));
            assert_eq!(train(&text, &["train.epochs=2"]).batches, None);
            for set in ["train.batches=3", "train.clips=3"] {
                assert_eq!(train(&text, &[set]).batches, Some(3));
                assert_eq!(train(&text, &["train.epochs=2", set]).batches, Some(3));
            }
        }
    }

    #[test]
    fn former_names_are_read_and_the_present_ones_written() {
        let old = "clips = 9\nschedule = { kind = 'cosine', warmup = 3 }\nupdate_every = 'clip'\n";
        let new = "batches = 9\nlr_schedule = { kind = 'cosine', warmup = 3 }\n";
        assert_eq!(train(old, &[]), train(new, &[]));
        assert_eq!(train(old, &["train.lr_schedule.warmup=5"]), train(new, &["train.schedule.warmup=5"]));
        let written = Config::parse(&format!("{SMALL}[train]\n{old}"), "c.toml", &[]).unwrap().to_toml().unwrap();
        assert!(written.contains("batches = 9") && written.contains("lr_schedule") && !written.contains("clips ="));
    }

    #[test]
    fn a_key_under_both_of_its_names_is_refused() {
        let both = |new: &str, old: &str| format!("{SMALL}[train]\n{new}\n{old}\n");
        refused(&both("batches = 1", "clips = 1"), &[], &["line 4", "`clips` is the former name of `batches`"]);
        refused(
            &both("lr_schedule = { kind = 'cosine' }", "schedule = { kind = 'cosine' }"),
            &[],
            &["`schedule` is the former name of `lr_schedule`"],
        );
        refused(SMALL, &["train.clips=1", "train.batches=1"], &["train.clips", "train.batches", "keep one"]);
        refused(
            SMALL,
            &["train.schedule.kind=cosine", "train.lr_schedule.warmup=1"],
            &["train.lr_schedule", "keep one"],
        );
    }

    #[test]
    fn a_norm_to_clip_to_is_a_number_or_none() {
        use crate::config::ClipNorm;
        for (text, limit) in [("", ClipNorm::default().limit()), ("clip_norm = 'none'\n", None)] {
            assert_eq!(train(text, &[]).clip_norm.limit(), limit);
        }
        for (text, limit) in [("clip_norm = 0.5\n", 0.5), ("clip_norm = 2\n", 2.0)] {
            assert_eq!(train(text, &[]).clip_norm, ClipNorm::To(limit));
            assert_eq!(train(text, &["train.clip_norm=none"]).clip_norm.limit(), None);
        }
        assert_eq!(train("", &["train.clip_norm=1"]).clip_norm, ClipNorm::To(1.0));
        let written = Config::parse(SMALL, "c.toml", &["train.clip_norm=none".into()]).unwrap().to_toml().unwrap();
        assert!(written.contains("clip_norm = \"none\""), "{written}");
    }

    #[test]
    fn damping_by_depth_follows_what_gradients_are() {
        let beta = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            Config::parse(SMALL, "c.toml", &sets).unwrap().lr_depth()
        };
        assert_eq!(beta(&[]), 0.5);
        assert_eq!(beta(&["train.stash=inputs"]), 1.0);
        for rule in ["bp", "1f1b", "gpipe"] {
            assert_eq!(beta(&[&format!("train.rule={rule}")]), 1.0);
        }
        assert_eq!(beta(&["train.lr_depth=0.7", "train.rule=bp"]), 0.7);
        assert_eq!(beta(&["train.lr_depth=auto"]), 0.5);
        refused(SMALL, &["train.lr_depth=deep"], &["in `train.lr_depth`", "expected a number or \"auto\""]);
    }

    /// A manifest from before these keys, or their defaults, says what held then.
    #[test]
    fn a_manifest_has_the_defaults_of_its_time() {
        let of = |text: &str| Config::of_manifest(&format!("{SMALL}[train]\n{text}"), "manifest", &[]).unwrap();
        let before = of("seed = 3\n");
        assert_eq!((before.train.clip_norm.limit(), before.lr_depth(), before.train.seed), (None, 1.0, 3));
        let now = Config::parse(SMALL, "c.toml", &[]).unwrap();
        assert_eq!((now.train.clip_norm.limit(), now.lr_depth()), (Some(1.0), 0.5));
        assert_eq!(Config::of_manifest(&now.to_toml().unwrap(), "manifest", &[]).unwrap(), now);
    }

    #[test]
    fn a_table_in_part_leaves_the_rest_at_its_default() {
        use crate::nn::optim::{LrSchedule, OptimizerSpec};
        let OptimizerSpec::Adamw { betas, eps, weight_decay, no_decay, .. } = OptimizerSpec::default() else {
            panic!("another default")
        };
        let adamw = OptimizerSpec::Adamw { lr: 0.01, betas, eps, weight_decay, no_decay };
        assert_eq!(train("", &["train.optimizer.lr=0.01"]).optimizer, adamw);
        assert_eq!(train("optimizer = { lr = 0.01 }\n", &[]).optimizer, adamw);
        let sgd = OptimizerSpec::Sgd { lr: 0.01, momentum: 0.9, weight_decay: 0.0, nesterov: false, no_decay: false };
        for kind in ["train.optimizer.kind=sgd", "train.optimizer={ kind = 'sgd' }"] {
            let momentum = "train.optimizer.momentum=0.9";
            assert_eq!(train("", &[kind, "train.optimizer.lr=0.01", momentum]).optimizer, sgd);
        }
        let file = "optimizer = { kind = 'sgd', lr = 0.1, momentum = 0.9 }\n";
        assert_eq!(train(file, &["train.optimizer.lr=0.01"]).optimizer, sgd);
        assert_eq!(train("", &["train.lr_schedule.warmup=3"]).lr_schedule, LrSchedule::Constant { warmup: 3 });
        let cosine = LrSchedule::Cosine { warmup: 0, floor: 0.0 };
        assert_eq!(train("", &["train.lr_schedule.kind=cosine"]).lr_schedule, cosine);
        refused(SMALL, &["train.optimizer.momentum=0.9"], &["in `train.optimizer`", "unknown field `momentum`"]);
        refused(SMALL, &["train.optimizer.kind=adam"], &["did you mean `adamw`"]);
    }

    #[test]
    fn wrong_types_are_told_in_plain_words() {
        refused(SMALL, &["train.batches=abc"], &["in `train.batches`", "\"abc\"", "expected a whole number"]);
        refused(SMALL, &["data.batch=-1"], &["in `data.batch`", "expected a whole number, 0 or more"]);
        refused(SMALL, &["train.clip_norm=much"], &["in `train.clip_norm`", "expected a number or \"none\""]);
        refused(SMALL, &["train.update_every=day"], &["expected \"batch\" or a number of steps"]);
        refused(SMALL, &["data.train=3"], &["in `data.train`", "expected a glob of shards"]);
        refused(SMALL, &["model.skip.delay=true"], &["expected \"aligned\" or a number"]);
        refused(SMALL, &["model.skip.edges=[2]"], &["expected [from, to] or { from, to, delay }"]);
        refused(SMALL, &["train.optimizer=adam"], &["in `train.optimizer`", "such as { kind = \"adamw\" }"]);
        refused(SMALL, &["train.lr_schedule=cosine"], &["in `train.lr_schedule`", "such as { kind = \"constant\" }"]);
        refused(SMALL, &["model.skip=3"], &["in `model.skip`", "{ spans = [2] }"]);
        refused(SMALL, &["model.skip.spans=2"], &["expected a list"]);
        for batches in ["100", "'100..'", "a..b", "-1..3"] {
            refused(SMALL, &[&format!("run.trace={batches}")], &["in `run.trace`", "\"FIRST..END\""]);
        }
        refused(SMALL, &["run.trace=103..100"], &["in `run.trace`", "103..100 are no batches"]);
        refused(SMALL, &["run.trase=1..2"], &["did you mean `trace`"]);
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
        refused(SMALL, &["train.clip_norm=-1"], &["clip_norm", "\"none\""]);
        for alpha in ["0", "-0.2", "inf"] {
            refused(SMALL, &[&format!("data.mixup={alpha}")], &["data.mixup", "above 0"]);
        }
        refused(SMALL, &["data.mixup=0.2", "model.task=future-frames"], &["data.mixup", "recognition"]);
        for decay in ["0", "1", "-0.5", "nan"] {
            refused(SMALL, &[&format!("train.ema={decay}")], &["train.ema", "between 0 and 1"]);
        }
        refused(SMALL, &["train.scale_lr=0"], &["train.scale_lr = 0", "at least 1"]);
        for part in ["1", "-0.1", "nan"] {
            refused(SMALL, &[&format!("train.label_smoothing={part}")], &["train.label_smoothing", "0 to below 1"]);
        }
        refused(
            SMALL,
            &["train.label_smoothing=0.1", "model.task=future-frames"],
            &["train.label_smoothing", "recognition"],
        );
        for beta in ["0", "1.5", "-1", "nan"] {
            refused(SMALL, &[&format!("train.lr_depth={beta}")], &["train.lr_depth", "above 0"]);
        }
    }

    #[test]
    fn aligned_delay_is_the_span() {
        let config = Config::parse(SMALL, "c.toml", &[]).unwrap();
        let graph = config.graph(4).unwrap();
        assert!(graph.edges().iter().filter(|e| !e.is_main()).all(|e| e.delay == e.span()));
    }
}
