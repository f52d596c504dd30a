//! `sideways report`: what stands in the page is what the run's files say, whatever state they are in.

use std::fmt::Write;
use std::path::Path;

use crate::common::mpirun::text;
use crate::common::program::alone;
use crate::common::runs::{config, shard, train};

/// Writes the page of `runs`, and reads it.
fn report(runs: &[&Path], out: &Path) -> String {
    let folders = runs.iter().map(|run| run.to_str().unwrap());
    let args: Vec<&str> = ["report", "--out", out.to_str().unwrap()].into_iter().chain(folders).collect();
    let output = alone(&args);
    assert!(output.status.success(), "{}", text(&output));
    let page = std::fs::read_to_string(out).unwrap();
    // It needs nothing else, and no tag is left open.
    let outside = page.replace("src=\"data:image/png;base64,", "");
    assert!(!page.contains("<script") && !outside.contains("src=") && !page.contains("href="), "{page}");
    for tag in ["table", "div", "svg", "details", "pre", "p"] {
        let (begun, ended) = (
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count(),
            page.matches(&format!("</{tag}>")).count(),
        );
        assert_eq!(begun, ended, "{tag}");
    }
    page
}

#[test]
fn a_page_says_what_the_metrics_say() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("train.h5"), 12, 14, false);
    let run = |name: &str, more: &[&str]| {
        let folder = dir.path().join(name);
        let at = format!("run.dir={}", folder.display());
        let sets = [&[at.as_str(), "train.batches=12", "train.validate_every=4"], more].concat();
        // Stopped and gone on.
        train(&config(dir.path(), &sets), Some(5));
        train(&config(dir.path(), &sets), None);
        folder
    };
    let first = run("first", &["model.skip={ spans = [2] }"]);
    let page = report(&[&first], &dir.path().join("page.html"));
    let metrics = std::fs::read_to_string(first.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let batches: Vec<&serde_json::Value> = lines.iter().filter(|line| line.get("kind").is_none()).collect();
    // The last tenth of 12 batches: two.
    let loss = (batches[10]["loss"].as_f64().unwrap() + batches[11]["loss"].as_f64().unwrap()) / 2.0;
    let best = sideways::checkpoint::best::Best::read(&first.join("checkpoints")).unwrap();
    let cells = [
        format!("<td>{loss:.4}</td>"),
        format!("<td>top-1 {:.2} % after {}</td>", 100.0 * best.value, best.batches),
        "<td>12</td>".into(),
        "<td>1</td></tr>".into(),
    ];
    for cell in cells {
        assert!(page.contains(&cell), "{cell} in {page}");
    }
    // Five modules with their time, as the lines add up.
    let spent: f64 = batches
        .iter()
        .flat_map(|line| line["workers"][1]["time"].as_object().unwrap().values())
        .filter_map(|t| t.as_f64())
        .sum();
    assert!(page.contains(&format!("<tr><td>2</td><td>0</td><td>{spent:.1}</td>")), "{spent} in {page}");
    assert_eq!(page.matches("<div class=\"bar\">").count(), 5);
    assert!(
        page.contains("Norm of the gradient") && page.contains("Top-1 accuracy") && page.contains("rule = &quot;"),
        "{page}"
    );

    // Both starts, each with its place; the network with what it is made of; what it waited for.
    let attempts = std::fs::read_to_string(first.join("attempts.jsonl")).unwrap();
    let attempts: Vec<serde_json::Value> = attempts.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(attempts.iter().map(|a| a["first"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 5]);
    let host = sideways::sys::host::hostname();
    for attempt in &attempts {
        assert_eq!(attempt["hosts"], serde_json::json!([[host, 1]]));
        assert_eq!((attempt["modules"].as_array().unwrap().len(), attempt["edges"].as_array().unwrap().len()), (5, 7));
        assert!(page.contains(&format!("<td>{}</td><td>1</td><td>{host}</td>", attempt["first"])), "{page}");
    }
    let parameters = attempts[0]["modules"][1]["parameters"].as_u64().unwrap();
    assert!(page.contains(&format!(">{parameters} parameters</text>")), "{parameters} in {page}");
    assert!(page.contains("first was held back by ") && page.contains("<title>module 5: "), "{page}");

    // What other commands wrote of it, beside it.
    let (scores, confusion) = (dir.path().join("scores.csv"), dir.path().join("confusion.csv"));
    let (scores, confusion) = (scores.to_str().unwrap(), confusion.to_str().unwrap());
    let data = dir.path().join("train.h5");
    let evaluated = alone(&[
        "eval",
        first.to_str().unwrap(),
        "--data",
        data.to_str().unwrap(),
        "--scores",
        scores,
        "--confusion",
        confusion,
    ]);
    assert!(evaluated.status.success(), "{}", text(&evaluated));
    let both = alone(&[
        "report",
        first.to_str().unwrap(),
        "--with",
        scores,
        "--with",
        confusion,
        "--out",
        dir.path().join("with.html").to_str().unwrap(),
    ]);
    assert!(both.status.success(), "{}", text(&both));
    let with = std::fs::read_to_string(dir.path().join("with.html")).unwrap();
    let said =
        with.match_indices("12 videos of ").map(|(at, _)| with[at..].lines().next().unwrap()).collect::<Vec<_>>();
    assert!(said.len() == 2 && said[0] == said[1], "{said:?}");
    let refused = alone(&["report", first.to_str().unwrap(), "--with", data.to_str().unwrap(), "--out", "/dev/null"]);
    assert!(refused.status.code() == Some(2) && text(&refused).contains("no table of eval"), "{}", text(&refused));

    // Two runs over one another, the second with its metrics cut short and a name that is no HTML.
    let second = run("a<b", &["train.stash=activations"]);
    let file = second.join("metrics.jsonl");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 40]).unwrap();
    let page = report(&[&first, &second], &dir.path().join("both.html"));
    assert!(page.contains("a&lt;b: 1 line(s) of metrics.jsonl are damaged"), "{page}");
    assert!(page.contains("first, training") && page.contains("stash activations"), "{page}");
    assert!(!page.contains("a<b"), "{page}");

    // What is no run.
    for (folder, says) in [("nowhere", "no such folder"), ("empty", "neither metrics.jsonl nor config.toml")] {
        std::fs::create_dir_all(dir.path().join("empty")).unwrap();
        let output = alone(&["report", dir.path().join(folder).to_str().unwrap(), "--out", "/dev/null"]);
        assert!(output.status.code() == Some(2) && text(&output).contains(says), "{}", text(&output));
    }
    // Nor is a pipe waited for.
    let piped = dir.path().join("piped");
    std::fs::create_dir(&piped).unwrap();
    std::fs::copy(first.join("config.toml"), piped.join("config.toml")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(piped.join("metrics.jsonl")).status().unwrap().success());
    assert!(report(&[&piped], &dir.path().join("piped.html")).contains("metrics.jsonl cannot be read: it is a"));
    // A run that has only begun is a page too.
    std::fs::copy(first.join("config.toml"), dir.path().join("empty/config.toml")).unwrap();
    let page = report(&[&dir.path().join("empty")], &dir.path().join("begun.html"));
    assert!(page.contains("no batch is on record yet") && page.contains("metrics.jsonl cannot be read"), "{page}");
}

/// Ten thousand batches of sixteen modules make a page of less than 2 MB.
#[test]
fn a_long_run_makes_a_small_page() {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for batch in 1..=10_000 {
        let value = f64::from(batch).sin();
        let worker = |m: usize| {
            format!(
                r#"{{"module":{m},"replica":0,"rank":{m},"backward_steps":1,"grad_norm":{value},"time":{{"forward":0.1}}}}"#
            )
        };
        let workers: Vec<String> = (1..=16).map(worker).collect();
        let _ = writeln!(
            lines,
            r#"{{"batches":{batch},"loss":{value},"top1":0.5,"lr":0.1,"frames_per_second":{value},"elapsed":{batch},"skipped":0,"videos_skipped":0,"workers":[{}]}}"#,
            workers.join(",")
        );
        if batch % 100 == 0 {
            let _ = writeln!(lines, r#"{{"kind":"validation","batches":{batch},"clips":3,"loss":1.0,"top1":0.25}}"#);
        }
    }
    std::fs::write(dir.path().join("metrics.jsonl"), lines).unwrap();
    let page = report(&[dir.path()], &dir.path().join("page.html"));
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
    assert!(page.contains("config.toml cannot be read") && page.contains("<td>10000</td>"), "{}", &page[..3000]);
}
