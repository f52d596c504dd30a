//! A trace of modules on GPUs: when their passes were at work, by the GPU's own clock, on the host's.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::common::cuda::Place;
use crate::common::mpirun::text;

/// Every pass that a module launched was at work after that, in the order of launches, and in the same time as the module.
#[test]
fn passes_on_a_gpu_are_recorded() {
    for graphs in ["run.graphs=true", "run.graphs=false"] {
        let sets = ["run.device=cuda", "run.trace=1..3", "train.batches=4", graphs];
        let place = Place::new(&[&["model.modules=3", "model.skip={ spans = [2] }"], &sets[..]].concat());
        place.trained("run", 3, &[], &[]);
        let (run, out) = (place.at("run").display().to_string(), place.at("trace.json"));
        let output = place.run(0, &["trace", &run, "--out", out.to_str().unwrap()], &[]);
        assert!(output.status.success(), "{}", text(&output));
        let trace: Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        // By tick and step; the first of each.
        let slices = |cat: &str, name: &str, tid: u64| {
            let of =
                events.iter().filter(|e| e["ph"] == "X" && e["cat"] == cat && e["name"] == name && e["tid"] == tid);
            let mut slices = BTreeMap::new();
            for e in of {
                let key = ["tick", "step"].map(|key| e["args"][key].as_u64().unwrap());
                slices.entry(key).or_insert(["ts", "dur"].map(|key| e[key].as_f64().unwrap()));
            }
            slices
        };
        let whole = |tid: u64| {
            let of = events.iter().filter(|e| e["ph"] == "X" && e["cat"] == "batch" && e["tid"] == tid);
            of.map(|e| e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap()).fold(0.0, f64::max)
        };
        for module in 1..=3 {
            let name = format!("module {module}, GPU");
            assert!(events.iter().any(|e| e["tid"] == module + 3 && e["args"]["name"] == name[..]), "{name}");
            for pass in ["forward", "backward"] {
                let (asked, done) = (slices("work", pass, module), slices("gpu", pass, module + 3));
                assert!(done.len() > 10 && done.keys().all(|key| asked.contains_key(key)), "{done:?} of {asked:?}");
                if pass == "forward" {
                    assert_eq!(done.len(), 2 * 14, "{done:?}");
                }
                let mut last = 0.0;
                for (key, [begin, length]) in &done {
                    // It is at work once it is launched, up to what the two clocks may differ, and before the batches end.
                    assert!(begin + 1000.0 > asked[key][0], "{key:?}: {begin} after {:?}", asked[key]);
                    assert!(*begin >= last && *length >= 0.0 && begin + length < whole(module) + 1000.0, "{key:?}");
                    last = begin + length;
                }
            }
            assert_eq!(slices("gpu", "update", module + 3).len(), 2);
        }
    }
}
