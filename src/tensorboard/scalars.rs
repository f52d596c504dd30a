//! What a line of `metrics.jsonl` says, by tag. The keys of the line are the names: there is no second list of them.

use serde_json::Value;

/// Keys that say where a line belongs, and are no measurements.
const PLACE: [&str; 2] = ["batches", "elapsed"];
/// The same of a worker.
const WORKER: [&str; 3] = ["module", "replica", "rank"];
/// What lines of future frames say 0 of.
const RECOGNITION: [&str; 2] = ["top1", "top5"];

/// The step of a line and its numbers by tag; `None` where it has no step. What is not finite is not there (`null`), so it is no
/// scalar either. Without `recognition` there are no shares of clips.
///
/// | tag | key |
/// |---|---|
/// | `train/KEY` | of a batch's line |
/// | `KEY/module_I`, `time/module_I/PHASE` | of its first replica's workers |
/// | `validation/KEY` | of a validation's line |
pub fn scalars(line: &Value, recognition: bool) -> Option<(u64, Vec<(String, f32)>)> {
    let validation = line.get("kind").is_some_and(|kind| kind == "validation");
    // Formerly "clips", which a validation counts.
    let step = line.get("batches").or(line.get("clips").filter(|_| !validation)).and_then(Value::as_u64)?;
    let group = if validation { "validation" } else { "train" };
    let mut found = Vec::new();
    for (key, value) in line.as_object()?.iter().filter(|(key, _)| !PLACE.contains(&key.as_str())) {
        let counts = recognition || !RECOGNITION.contains(&key.as_str());
        found.extend(value.as_f64().filter(|_| counts).map(|value| (format!("{group}/{key}"), value as f32)));
    }
    let workers = line.get("workers").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for worker in workers.iter().filter(|worker| worker.get("replica").is_none_or(|replica| replica == 0)) {
        let Some((module, worker)) = worker.get("module").and_then(Value::as_u64).zip(worker.as_object()) else {
            continue;
        };
        for (key, value) in worker.iter().filter(|(key, _)| !WORKER.contains(&key.as_str())) {
            found.extend(value.as_f64().map(|value| (format!("{key}/module_{module}"), value as f32)));
            for (part, value) in value.as_object().into_iter().flatten() {
                found.extend(value.as_f64().map(|value| (format!("{key}/module_{module}/{part}"), value as f32)));
            }
        }
    }
    Some((step, found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_are_names() {
        let batch = json!({
            "batches": 7, "loss": 0.5, "top1": 0.25, "lr": null, "elapsed": 3.0,
            "workers": [
                { "module": 1, "replica": 0, "rank": 0, "grad_norm": 2.0, "time": { "forward": 0.125 } },
                { "module": 1, "replica": 1, "rank": 1, "grad_norm": 3.0, "time": { "forward": 0.25 } },
            ],
        });
        let named = |line: &Value, recognition: bool| {
            let (step, mut found) = scalars(line, recognition).unwrap();
            found.sort_by(|a, b| a.0.cmp(&b.0));
            (step, found.into_iter().map(|(tag, value)| format!("{tag} {value}")).collect::<Vec<_>>())
        };
        let (step, tags) = named(&batch, true);
        assert_eq!(step, 7);
        let workers = ["grad_norm/module_1 2", "time/module_1/forward 0.125"];
        assert_eq!(tags, [&workers[..], &["train/loss 0.5", "train/top1 0.25"]].concat());
        assert_eq!(named(&batch, false).1, [&workers[..], &["train/loss 0.5"]].concat());
        let validation = json!({ "kind": "validation", "batches": 8, "clips": 3, "mse": 0.5, "best": true });
        assert_eq!(named(&validation, true), (8, vec!["validation/clips 3".into(), "validation/mse 0.5".into()]));
        assert_eq!(scalars(&json!({ "kind": "validation", "clips": 3 }), true), None);
        assert_eq!(scalars(&json!({ "clips": 3, "loss": 1 }), true).unwrap().0, 3);
    }
}
