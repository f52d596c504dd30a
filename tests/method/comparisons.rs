//! The comparisons that the other tests go by: they fail where they must.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::common::numbers::close;
use crate::common::runs::assert_close;

fn fails(compare: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(compare)).is_err()
}

#[test]
fn of_numbers() {
    let fails = |found: &[f64], expected: &[f64]| fails(|| close("numbers", found, expected, 1e-3));
    assert!(!fails(&[1.0, 2.0], &[1.0, 2.001]));
    assert!(fails(&[1.0, 2.0], &[1.0, 2.01]));
    assert!(fails(&[1.0], &[1.0, 2.0]) && fails(&[1.0, 2.0], &[1.0]) && fails(&[], &[]));
    assert!(fails(&[f64::NAN], &[1.0]) && fails(&[1.0], &[f64::NAN]) && fails(&[f64::NAN], &[f64::NAN]));
}

#[test]
fn of_sets_of_tensors() {
    let one = |name: &str, values: &[f64]| HashMap::from([(name.to_string(), values.to_vec())]);
    let fails = |a: &HashMap<_, _>, b: &HashMap<_, _>| fails(|| assert_close(a, b, 1e-3, "tensors"));
    let a = one("a", &[1.0, 2.0]);
    assert!(!fails(&a, &a) && !fails(&a, &one("a", &[1.0, 2.001])));
    assert!(fails(&a, &one("a", &[1.0, 2.01])) && fails(&a, &one("b", &[1.0, 2.0])));
    assert!(fails(&a, &one("a", &[1.0])) && fails(&one("a", &[1.0]), &a));
    assert!(fails(&one("a", &[f64::NAN]), &one("a", &[1.0])) && fails(&one("a", &[0.0]), &one("a", &[0.0])));
    assert!(fails(&HashMap::new(), &HashMap::new()));
}
